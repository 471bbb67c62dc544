//! How ranks find each other.
//!
//! Rank 0 listens where all know. The others greet it there, each with its number, the run it belongs
//! to and a port it listens on itself; once all have come, rank 0 tells every one where the others
//! are, and each connects to those below it. The connections of the greetings stay.
//!
//! A stranger at the door, such as a port scanner, is let go; a rank that does not belong here hears
//! why, and so do the others.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::frame::{Header, Kind, read_frame, write_frame};
use super::greeting::{GREETING, Greeting, VERSION, hear, say};

/// Between two attempts to reach somebody who may not be there yet.
const RETRY: Duration = Duration::from_millis(50);

/// Where ranks meet, and which.
#[derive(Clone, Debug)]
pub struct Meeting {
    /// This rank.
    pub rank: usize,
    /// Ranks of the run.
    pub size: usize,
    /// Where rank 0 listens: a name or an address.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// The run's name: ranks of another have come to the wrong place.
    pub run: String,
    /// A digest of everything that must be equal on all ranks.
    pub fingerprint: u64,
    /// How long to wait for all to come.
    pub patience: Duration,
    /// How long a rank may be silent from then on.
    pub deadline: Duration,
}

impl Meeting {
    /// A connection to every other rank, by number.
    ///
    /// # Errors
    /// With a sentence.
    pub(super) fn meet(&self) -> Result<Vec<Option<TcpStream>>, String> {
        if self.rank >= self.size {
            let (rank, size) = (self.rank, self.size);
            return Err(format!("there is no rank {rank} among {size}"));
        }
        match (self.size, self.rank) {
            (1, _) => Ok(vec![None]),
            (_, 0) => self.host_all(),
            _ => self.join_all(),
        }
    }

    fn greeting(&self, port: u16) -> Greeting {
        Greeting {
            version: VERSION,
            size: self.size as u32,
            rank: self.rank as u32,
            port,
            run: digest(&self.run),
            fingerprint: self.fingerprint,
        }
    }

    fn place(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// Where the meeting's name leads to.
    fn resolve(&self) -> Result<Vec<SocketAddr>, String> {
        let found = (self.host.as_str(), self.port).to_socket_addrs();
        let found: Vec<_> = found
            .map_err(|error| format!("cannot find the rendezvous host {}: {error}", self.host))?
            .collect();
        match found.is_empty() {
            true => Err(format!("the rendezvous host {} has no address", self.host)),
            false => Ok(found),
        }
    }

    // ---- rank 0 ---------------------------------------------------------------------------------

    fn host_all(&self) -> Result<Vec<Option<TcpStream>>, String> {
        let begun = Instant::now();
        let listener = listen(&self.resolve()?, self.port)
            .map_err(|error| format!("rank 0 cannot listen at {}: {error}", self.place()))?;
        let mut connections: Vec<Option<TcpStream>> = (0..self.size).map(|_| None).collect();
        let mut addresses = vec![String::new(); self.size];
        while connections.iter().flatten().count() + 1 < self.size {
            let next = accept_until(&listener, begun + self.patience);
            let next = next.map_err(|error| format!("rank 0 cannot accept: {error}"))?;
            let Some((mut stream, from)) = next else {
                let missing = (1..self.size).filter(|&rank| connections[rank].is_none());
                let missing: Vec<_> = missing.map(|rank| rank.to_string()).collect();
                let reason = format!(
                    "only {} of {} ranks came to {} within {} s; missing: {}",
                    self.size - missing.len(),
                    self.size,
                    self.place(),
                    self.patience.as_secs(),
                    missing.join(", "),
                );
                refuse_all(&mut connections, &reason);
                return Err(reason);
            };
            let greeting = match hear(&mut stream) {
                Ok(greeting) => greeting,
                Err(error) => {
                    tracing::warn!("let {from} go, which is no rank: {error}");
                    continue;
                }
            };
            if let Some(stray) = self.stray(&greeting) {
                // Another run's rank leaves this one's alone.
                tell(&mut stream, Kind::Refused, &stray);
                tracing::warn!("refused {from}: {stray}");
                continue;
            }
            let rank = greeting.rank as usize;
            let taken = connections.get(rank).is_some_and(Option::is_some);
            if let Some(reason) = self.unfit(&greeting, taken) {
                tell(&mut stream, Kind::Refused, &reason);
                refuse_all(&mut connections, &reason);
                return Err(reason);
            }
            addresses[rank] = SocketAddr::new(from.ip(), greeting.port).to_string();
            connections[rank] = Some(stream);
        }
        let table = addresses.join("\n");
        for (rank, stream) in connections.iter_mut().enumerate() {
            let Some(stream) = stream else { continue };
            let header = Header::plain(Kind::Welcome, 0, table.len());
            write_frame(stream, &header, table.as_bytes())
                .map_err(|error| format!("rank {rank} is lost: {error}"))?;
        }
        Ok(connections)
    }

    /// Why who greets belongs to another run, if so.
    fn stray(&self, theirs: &Greeting) -> Option<String> {
        let ours = self.greeting(0);
        if theirs.version != ours.version {
            let (theirs, ours) = (theirs.version, ours.version);
            return Some(format!(
                "another version of this program ({theirs}, here {ours}) came to {}",
                self.place()
            ));
        }
        (theirs.run != ours.run).then(|| {
            let (run, place) = (&self.run, self.place());
            format!("the ranks that meet at {place} are those of run \"{run}\": use another port")
        })
    }

    /// Why who greets makes the run impossible, if so.
    fn unfit(&self, theirs: &Greeting, taken: bool) -> Option<String> {
        let (rank, size) = (theirs.rank, theirs.size);
        if size as usize != self.size {
            let ours = self.size;
            return Some(format!(
                "rank {rank} was started as one of {size} ranks, rank 0 as one of {ours}: start \
                 all with the same number"
            ));
        }
        if rank == 0 || rank >= size || taken {
            return Some(format!(
                "two processes say they are rank {rank} of {size}: give each its own number"
            ));
        }
        (theirs.fingerprint != self.fingerprint).then(|| {
            format!(
                "rank {rank} was started with another configuration or another build of the \
                 program than rank 0"
            )
        })
    }

    // ---- all others -----------------------------------------------------------------------------

    fn join_all(&self) -> Result<Vec<Option<TcpStream>>, String> {
        let until = Instant::now() + self.patience;
        let unreachable = |error: String| {
            let (place, patience) = (self.place(), self.patience.as_secs());
            format!("rank 0 does not answer at {place} within {patience} s: {error}")
        };
        let mut zero = loop {
            // The name may come to be known only when the first node is up.
            let tried = self.resolve().and_then(|addresses| {
                TcpStream::connect(addresses.as_slice()).map_err(|error| error.to_string())
            });
            match tried {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= until => return Err(unreachable(error)),
                Err(_) => std::thread::sleep(RETRY),
            }
        };
        // The others reach this rank where it reaches rank 0 from.
        let local = zero.local_addr().map_err(|error| error.to_string())?;
        let listener = TcpListener::bind((local.ip(), 0))
            .map_err(|error| format!("cannot listen at {}: {error}", local.ip()))?;
        let port = listener.local_addr().map_err(|error| error.to_string())?;
        let greeting = self.greeting(port.port());
        say(&mut zero, &greeting).map_err(|error| unreachable(error.to_string()))?;

        let left = until
            .saturating_duration_since(Instant::now())
            .max(GREETING);
        let answer = zero.set_read_timeout(Some(left)).map_err(Into::into);
        let answer = answer.and_then(|()| read_frame(&mut zero, 0));
        let (header, text) = answer.map_err(|error| unreachable(error.to_string()))?;
        let text = String::from_utf8_lossy(&text).into_owned();
        match header.kind {
            Kind::Welcome => {}
            Kind::Refused => return Err(text),
            other => return Err(unreachable(format!("it answers with {other:?}"))),
        }
        let there = zero.peer_addr().map_err(|error| error.to_string())?;
        let table = self.table(&text, there.ip())?;

        let mut connections: Vec<Option<TcpStream>> = (0..self.size).map(|_| None).collect();
        connections[0] = Some(zero);
        for rank in 1..self.rank {
            let connect = || -> io::Result<TcpStream> {
                let mut stream = TcpStream::connect_timeout(&table[rank], GREETING)?;
                say(&mut stream, &greeting)?;
                Ok(stream)
            };
            let at = table[rank];
            let stream =
                connect().map_err(|error| format!("cannot reach rank {rank} at {at}: {error}"))?;
            connections[rank] = Some(stream);
        }
        while let Some(missing) = (self.rank + 1..self.size).find(|&r| connections[r].is_none()) {
            let next = accept_until(&listener, Instant::now() + self.deadline);
            let next = next.map_err(|error| format!("cannot accept: {error}"))?;
            let Some((mut stream, from)) = next else {
                return Err(format!(
                    "rank {missing} does not reach rank {} at {}: is a firewall between them?",
                    self.rank, table[self.rank]
                ));
            };
            match hear(&mut stream) {
                Ok(theirs)
                    if self.stray(&theirs).is_none() && self.unfit(&theirs, false).is_none() =>
                {
                    let rank = theirs.rank as usize;
                    connections[rank] = Some(stream);
                }
                other => tracing::warn!("let {from} go, which is no rank of this run: {other:?}"),
            }
        }
        Ok(connections)
    }

    /// Where the ranks listen. One that rank 0 reaches by its own loopback is on rank 0's host.
    fn table(&self, text: &str, zero: IpAddr) -> Result<Vec<SocketAddr>, String> {
        let nowhere = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
        let lines = text.lines().enumerate();
        let table: Option<Vec<SocketAddr>> = lines
            .map(|(rank, line)| {
                if rank == 0 {
                    return Some(nowhere);
                }
                let mut address: SocketAddr = line.parse().ok()?;
                if address.ip().is_loopback() {
                    address.set_ip(zero);
                }
                Some(address)
            })
            .collect();
        table
            .filter(|table| table.len() == self.size)
            .ok_or_else(|| format!("rank 0 names no places for {} ranks: {text:?}", self.size))
    }
}

/// Listens at `port`: on the loopback where the meeting is there, else on every interface.
fn listen(addresses: &[SocketAddr], port: u16) -> io::Result<TcpListener> {
    // A name of this host may lead to a loopback address that other hosts know nothing of.
    let here = |address: &SocketAddr| address.ip().is_loopback() && !is_debian_name(address);
    if addresses.iter().all(here) {
        return TcpListener::bind(addresses);
    }
    match addresses.iter().any(SocketAddr::is_ipv4) {
        true => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)),
        false => TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)),
    }
}

/// Debian's installer gives a host's own name this address in /etc/hosts.
fn is_debian_name(address: &SocketAddr) -> bool {
    address.ip() == IpAddr::V4(Ipv4Addr::new(127, 0, 1, 1))
}

/// The next connection, in blocking mode; `None` at the deadline.
fn accept_until(
    listener: &TcpListener,
    until: Instant,
) -> io::Result<Option<(TcpStream, SocketAddr)>> {
    listener.set_nonblocking(true)?;
    loop {
        match listener.accept() {
            Ok((stream, from)) => {
                stream.set_nonblocking(false)?;
                return Ok(Some((stream, from)));
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if Instant::now() >= until {
                    return Ok(None);
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            // The other side gave up in the meantime.
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Tells the other side a sentence, if it still listens.
fn tell(stream: &mut TcpStream, kind: Kind, text: &str) {
    let header = Header::plain(kind, 0, text.len());
    if let Err(error) = write_frame(stream, &header, text.as_bytes()) {
        tracing::debug!("a rank left before it heard why it is refused: {error}");
    }
}

fn refuse_all(connections: &mut [Option<TcpStream>], reason: &str) {
    for stream in connections.iter_mut().flatten() {
        tell(stream, Kind::Refused, reason);
    }
}

/// FNV-1a.
fn digest(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meeting(rank: usize, size: usize) -> Meeting {
        Meeting {
            rank,
            size,
            host: "10.0.0.1".into(),
            port: 1,
            run: "a".into(),
            fingerprint: 7,
            patience: GREETING,
            deadline: GREETING,
        }
    }

    #[test]
    fn loopback_in_the_table_is_rank_0s_host() {
        let zero = "10.0.0.1".parse().expect("an address");
        let text = "\n127.0.0.1:5\n10.0.0.2:6";
        let table = meeting(2, 3).table(text, zero).expect("three places");
        assert_eq!(table[1].to_string(), "10.0.0.1:5");
        assert_eq!(table[2].to_string(), "10.0.0.2:6");
        for hostile in ["", "\n1.2.3.4:5", "\nx\ny", "\n1.2.3.4:5\n6\n7"] {
            assert!(meeting(2, 3).table(hostile, zero).is_err(), "{hostile:?}");
        }
    }

    #[test]
    fn who_does_not_belong_hears_why() {
        let zero = meeting(0, 2);
        let mut theirs = meeting(1, 2).greeting(9);
        assert_eq!(
            (zero.stray(&theirs), zero.unfit(&theirs, false)),
            (None, None)
        );
        let twice = zero.unfit(&theirs, true).expect("twice");
        assert!(
            twice.contains("two processes say they are rank 1"),
            "{twice}"
        );
        theirs.fingerprint = 8;
        let other = zero.unfit(&theirs, false).expect("another configuration");
        assert!(other.contains("another configuration"), "{other}");
        theirs.size = 4;
        let size = zero.unfit(&theirs, false).expect("another size");
        assert!(
            size.contains("one of 4 ranks, rank 0 as one of 2"),
            "{size}"
        );
        theirs.run = 0;
        assert!(
            zero.stray(&theirs)
                .expect("another run")
                .contains("run \"a\"")
        );
        theirs.version = 0;
        assert!(
            zero.stray(&theirs)
                .expect("another version")
                .contains("version")
        );
    }
}
