//! What goes over a connection: a header of 40 bytes, then as many bytes as it says.
//!
//! ```text
//! 0  magic "TTTf"   4  kind       5  operation   6  dtype   7  zero
//! 8  group          12 checksum of the other 36 bytes
//! 16 sequence       24 ticket     32 bytes that follow        little endian
//! ```
//!
//! A header is believed only as a whole: damaged, out of order or from a stranger it is an error. The
//! memory for a frame grows with what has arrived, never with what was announced.

use std::io::{self, ErrorKind, Read, Write};

use crate::mailbox::{Operation, Tag};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 40;
/// The longest frame: no unit of a model comes near.
pub const MAX_BYTES: u64 = 1 << 37;
/// The longest frame of text.
pub const MAX_TEXT_BYTES: u64 = 1 << 20;
/// Memory is taken in pieces of this size.
const PIECE: usize = 1 << 20;

const MAGIC: [u8; 4] = *b"TTTf";

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A tensor of an exchange.
    Tensor,
    /// The sender lives, and what it does.
    Heartbeat,
    /// The sender ends in order and sends nothing more.
    Bye,
    /// The sender ends because of what the text says.
    Failed,
    /// Who the sender is.
    Hello,
    /// Where the ranks are.
    Welcome,
    /// Why the receiver has no part in the run, as text.
    Refused,
}

const KINDS: [Kind; 7] = [
    Kind::Tensor,
    Kind::Heartbeat,
    Kind::Bye,
    Kind::Failed,
    Kind::Hello,
    Kind::Welcome,
    Kind::Refused,
];

/// Precision of a tensor on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireType {
    /// Not a tensor.
    None,
    /// f32.
    F32,
    /// bf16.
    Bf16,
}

const TYPES: [WireType; 3] = [WireType::None, WireType::F32, WireType::Bf16];

/// What is said of a frame before its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is for.
    pub kind: Kind,
    /// Which exchange a tensor belongs to.
    pub tag: Tag,
    /// Precision of a tensor.
    pub dtype: WireType,
    /// Which frame of the connection this is, from 0.
    pub sequence: u64,
    /// Bytes that follow.
    pub bytes: u64,
}

/// Why no frame was read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The other side closed the connection between two frames.
    #[error("its connection closed")]
    Closed,
    /// Nothing came for as long as the connection's deadline.
    #[error("nothing was heard of it for its deadline")]
    Silent,
    /// The connection broke.
    #[error("its connection broke ({0})")]
    Io(io::Error),
    /// What came is no frame.
    #[error("it sent what is no frame ({0})")]
    Damaged(String),
}

impl From<io::Error> for FrameError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Self::Silent,
            ErrorKind::UnexpectedEof => Self::Io(error),
            ErrorKind::ConnectionReset => Self::Closed,
            _ => Self::Io(error),
        }
    }
}

impl Header {
    /// A frame that is no tensor.
    pub fn plain(kind: Kind, sequence: u64, bytes: usize) -> Self {
        Self {
            kind,
            tag: Tag {
                group: 0,
                ticket: 0,
                operation: Operation::Barrier,
            },
            dtype: WireType::None,
            sequence,
            bytes: bytes as u64,
        }
    }

    /// The header as it is sent.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        // Every value is in its table: it can only come from the enum.
        let number = |place: Option<usize>| place.map_or(u8::MAX, |place| place as u8);
        let mut out = [0; HEADER_BYTES];
        out[..4].copy_from_slice(&MAGIC);
        out[4] = number(KINDS.iter().position(|&k| k == self.kind));
        out[5] = number(Operation::ALL.iter().position(|&o| o == self.tag.operation));
        out[6] = number(TYPES.iter().position(|&t| t == self.dtype));
        out[8..12].copy_from_slice(&self.tag.group.to_le_bytes());
        out[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        out[24..32].copy_from_slice(&self.tag.ticket.to_le_bytes());
        out[32..].copy_from_slice(&self.bytes.to_le_bytes());
        let checksum = checksum(&out);
        out[12..16].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// The header that `bytes` encode, if they encode one with this number that may be so long.
    ///
    /// # Errors
    /// [`FrameError::Damaged`].
    pub fn decode(bytes: &[u8; HEADER_BYTES], sequence: u64) -> Result<Self, FrameError> {
        let damaged = |what: &str| Err(FrameError::Damaged(what.into()));
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i]));
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        if bytes[..4] != MAGIC {
            return damaged("it does not begin like one: another program, or a newer version");
        }
        if word(12) != checksum(bytes) {
            return damaged("its checksum is wrong");
        }
        let (Some(&kind), Some(&operation), Some(&dtype), 0) = (
            KINDS.get(usize::from(bytes[4])),
            Operation::ALL.get(usize::from(bytes[5])),
            TYPES.get(usize::from(bytes[6])),
            bytes[7],
        ) else {
            return damaged("it is of an unknown kind");
        };
        let header = Self {
            kind,
            tag: Tag {
                group: word(8),
                ticket: long(24),
                operation,
            },
            dtype,
            sequence: long(16),
            bytes: long(32),
        };
        if header.sequence != sequence {
            let number = header.sequence;
            return damaged(&format!("number {number} where {sequence} was due"));
        }
        let longest = match kind {
            Kind::Tensor => MAX_BYTES,
            Kind::Bye => 0,
            _ => MAX_TEXT_BYTES,
        };
        if header.bytes > longest {
            return damaged(&format!("{} bytes for {kind:?}", header.bytes));
        }
        let element = match (kind, dtype) {
            (Kind::Tensor, WireType::F32) => 4,
            (Kind::Tensor, WireType::Bf16) => 2,
            (Kind::Tensor, WireType::None) => return damaged("a tensor without a precision"),
            (_, WireType::None) => 1,
            _ => return damaged("a precision without a tensor"),
        };
        match header.bytes.is_multiple_of(element) {
            true => Ok(header),
            false => damaged("half an element"),
        }
    }
}

/// FNV-1a over a header without its checksum.
fn checksum(header: &[u8; HEADER_BYTES]) -> u32 {
    let counted = header[..12].iter().chain(&header[16..]);
    counted.fold(0x811c_9dc5, |hash, &byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

/// Writes a frame.
///
/// # Errors
/// If the connection takes it not.
pub fn write_frame(to: &mut impl Write, header: &Header, payload: &[u8]) -> io::Result<()> {
    to.write_all(&header.encode())?;
    to.write_all(payload)
}

/// Reads frame number `sequence` of a connection.
///
/// # Errors
/// If there is none, or what comes is not one.
pub fn read_frame(from: &mut impl Read, sequence: u64) -> Result<(Header, Vec<u8>), FrameError> {
    let mut header = [0; HEADER_BYTES];
    // The end of the connection is an end in itself only where a frame would begin.
    match from.read(&mut header) {
        Ok(0) => return Err(FrameError::Closed),
        Ok(n) => from.read_exact(&mut header[n..])?,
        Err(error) if error.kind() == ErrorKind::Interrupted => from.read_exact(&mut header)?,
        Err(error) => return Err(error.into()),
    }
    let header = Header::decode(&header, sequence)?;
    let mut payload = vec![];
    read_payload(from, header.bytes, &mut payload)?;
    Ok((header, payload))
}

/// Reads `bytes` bytes into `payload`, whose memory stays within twice of what arrived and a piece.
fn read_payload(from: &mut impl Read, bytes: u64, payload: &mut Vec<u8>) -> Result<(), FrameError> {
    let bytes = usize::try_from(bytes).map_err(|_| FrameError::Damaged("too long".into()))?;
    while payload.len() < bytes {
        let have = payload.len();
        let piece = (bytes - have).min(PIECE);
        if payload.capacity() - have < piece {
            let more = (bytes - have).min(PIECE.max(have));
            if payload.try_reserve_exact(more).is_err() {
                return Err(FrameError::Damaged(format!("no memory for {bytes} bytes")));
            }
        }
        payload.resize(have + piece, 0);
        from.read_exact(&mut payload[have..])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn headers() -> impl Strategy<Value = Header> {
        let tag = (0..8usize, any::<u32>(), any::<u64>());
        (tag, 0..2usize, any::<u64>(), 0..300u64).prop_map(
            |((operation, group, ticket), dtype, sequence, elements)| Header {
                kind: Kind::Tensor,
                tag: Tag {
                    group,
                    ticket,
                    operation: Operation::ALL[operation],
                },
                dtype: TYPES[dtype + 1],
                sequence,
                bytes: elements * 4,
            },
        )
    }

    fn frame(header: &Header) -> (Vec<u8>, Vec<u8>) {
        let payload: Vec<u8> = (0..header.bytes).map(|i| (i * 31 + 7) as u8).collect();
        let mut bytes = vec![];
        write_frame(&mut bytes, header, &payload).expect("memory takes it");
        (bytes, payload)
    }

    proptest! {
        #[test]
        fn frames_come_back(header in headers()) {
            let (bytes, payload) = frame(&header);
            let read = read_frame(&mut bytes.as_slice(), header.sequence).expect("a frame");
            prop_assert_eq!(read, (header, payload));
        }

        #[test]
        fn a_flipped_bit_of_the_header_is_seen(header in headers(), bit in 0..HEADER_BYTES * 8) {
            let (mut bytes, _) = frame(&header);
            bytes[bit / 8] ^= 1 << (bit % 8);
            let read = read_frame(&mut bytes.as_slice(), header.sequence);
            prop_assert!(matches!(read, Err(FrameError::Damaged(_))), "{:?}", read);
        }

        #[test]
        fn a_frame_out_of_order_is_seen(header in headers(), other in any::<u64>()) {
            prop_assume!(other != header.sequence);
            let (bytes, _) = frame(&header);
            let read = read_frame(&mut bytes.as_slice(), other);
            prop_assert!(matches!(read, Err(FrameError::Damaged(_))), "{:?}", read);
        }

        #[test]
        fn a_cut_frame_is_no_frame(header in headers(), keep in 0..1000usize) {
            let (bytes, _) = frame(&header);
            let keep = keep % bytes.len();
            let read = read_frame(&mut &bytes[..keep], header.sequence);
            match keep {
                0 => prop_assert!(matches!(read, Err(FrameError::Closed)), "{:?}", read),
                _ => prop_assert!(matches!(read, Err(FrameError::Io(_))), "{:?}", read),
            }
        }

        #[test]
        fn soup_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(read_frame(&mut bytes.as_slice(), 0).is_err());
        }

        /// A hostile header with a right checksum: any kind, precision and length.
        #[test]
        fn hostile_headers_never_panic(mut bytes in prop::collection::vec(any::<u8>(), HEADER_BYTES..200), kind in 0..9u8) {
            let header: &mut [u8; HEADER_BYTES] = bytes.first_chunk_mut().expect("a header");
            header[..4].copy_from_slice(&MAGIC);
            (header[4], header[5], header[6], header[7]) = (kind, header[5] % 9, header[6] % 4, 0);
            header[16..24].fill(0);
            let sum = checksum(header);
            header[12..16].copy_from_slice(&sum.to_le_bytes());
            let whole = bytes.len() - HEADER_BYTES;
            if let Ok((header, payload)) = read_frame(&mut bytes.as_slice(), 0) {
                prop_assert!(payload.len() as u64 == header.bytes && payload.len() <= whole);
            }
        }
    }

    #[test]
    fn memory_follows_what_arrives_not_what_is_announced() {
        let arrived = vec![1; 3 * PIECE + 5];
        let mut payload = vec![];
        let read = read_payload(&mut arrived.as_slice(), MAX_BYTES, &mut payload);
        assert!(matches!(read, Err(FrameError::Io(_))), "{read:?}");
        let most = 2 * arrived.len() + 2 * PIECE;
        assert!(payload.capacity() <= most, "{}", payload.capacity());
        assert!(payload.capacity() >= arrived.len());
    }

    #[test]
    fn lengths_that_cannot_be_are_refused() {
        let header = |kind, dtype, bytes| Header {
            dtype,
            ..Header::plain(kind, 0, bytes)
        };
        for (header, says) in [
            (header(Kind::Bye, WireType::None, 1), "1 bytes for Bye"),
            (header(Kind::Tensor, WireType::F32, 6), "half an element"),
            (
                header(Kind::Tensor, WireType::None, 8),
                "without a precision",
            ),
            (header(Kind::Hello, WireType::F32, 8), "without a tensor"),
            (header(Kind::Failed, WireType::None, 1 << 21), "for Failed"),
            (header(Kind::Tensor, WireType::F32, 1 << 38), "for Tensor"),
        ] {
            let refused = Header::decode(&header.encode(), 0).expect_err(says);
            assert!(refused.to_string().contains(says), "{refused}");
        }
    }
}
