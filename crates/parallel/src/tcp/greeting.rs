//! What a rank says of itself when it connects.

use std::io::{self, Read};
use std::net::TcpStream;
use std::time::Duration;

use super::frame::{Header, Kind, read_frame, write_frame};

/// Changes with what ranks say to each other, so that two versions do not misunderstand.
pub const VERSION: u32 = 2;
/// How long a greeting may take once connected.
pub const GREETING: Duration = Duration::from_secs(5);

/// What a rank says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// Its version of what ranks say to each other.
    pub version: u32,
    /// Ranks of the run it was started for.
    pub size: u32,
    /// Its number.
    pub rank: u32,
    /// Where it listens.
    pub port: u16,
    /// Digest of the run's name.
    pub run: u64,
    /// Digest of what must be equal on all ranks.
    pub fingerprint: u64,
}

impl Greeting {
    fn encode(&self) -> Vec<u8> {
        let mut out = vec![];
        for word in [self.version, self.size, self.rank, u32::from(self.port)] {
            out.extend(word.to_le_bytes());
        }
        out.extend(self.run.to_le_bytes());
        out.extend(self.fingerprint.to_le_bytes());
        out
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; 32] = bytes.try_into().ok()?;
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i]));
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Some(Self {
            version: word(0),
            size: word(4),
            rank: word(8),
            port: u16::try_from(word(12)).ok()?,
            run: long(16),
            fingerprint: long(24),
        })
    }
}

/// Greets who is at the other end.
///
/// # Errors
/// If the connection takes it not.
pub fn say(stream: &mut TcpStream, greeting: &Greeting) -> io::Result<()> {
    let bytes = greeting.encode();
    let header = Header::plain(Kind::Hello, 0, bytes.len());
    write_frame(stream, &header, &bytes)
}

/// The greeting of who has connected.
///
/// # Errors
/// With why it is no rank.
pub fn hear(stream: &mut TcpStream) -> Result<Greeting, String> {
    let timeout = |limit| stream.set_read_timeout(limit).map_err(|e| e.to_string());
    timeout(Some(GREETING))?;
    let mut limited = stream.take(1 << 10);
    let (header, bytes) = read_frame(&mut limited, 0).map_err(|error| error.to_string())?;
    match (header.kind, Greeting::decode(&bytes)) {
        (Kind::Hello, Some(greeting)) => Ok(greeting),
        (kind, _) => Err(format!("it begins with {kind:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn greetings_come_back(size: u32, rank: u32, port: u16, run: u64, fingerprint: u64) {
            let greeting = Greeting { version: VERSION, size, rank, port, run, fingerprint };
            prop_assert_eq!(Greeting::decode(&greeting.encode()), Some(greeting));
        }

        #[test]
        fn other_greetings_are_none(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            prop_assert!(bytes.len() == 32 || Greeting::decode(&bytes).is_none());
        }
    }
}
