//! Pings, every 50 ms to each target, from one raw socket.

use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{self, AddressFamily, SocketFlags, SocketType};

use super::page;
use crate::{Error, Result};

const INTERVAL: Duration = Duration::from_millis(50);
/// Shorter ones are not kept: several missing pings in a row.
const GAP_KEPT: Duration = Duration::from_millis(150);
const GAPS_MAX: usize = 10_000;
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
/// Answers are compared with so many of the last pings, to see one answered twice.
const REMEMBERED: u64 = 4096;

/// A time without an answer.
#[derive(Debug, Clone, Copy)]
pub struct Gap {
    /// The last answer before it.
    pub begin: Instant,
    /// Until the next answer.
    pub length: Duration,
}

/// What pings saw of one target.
#[derive(Debug, Clone, Default)]
pub struct PingStats {
    /// Pings sent since the last [`forget`].
    pub sent: u64,
    /// Answers.
    pub answered: u64,
    /// Answers to a ping that was answered before: two guests answer.
    pub duplicates: u64,
    /// Gaps of 60 ms and more, and the one that goes on.
    pub gaps: Vec<Gap>,
}

impl PingStats {
    /// The longest gap.
    pub fn longest_gap(&self) -> Duration {
        self.gaps.iter().map(|g| g.length).max().unwrap_or_default()
    }
}

#[derive(Debug, Default)]
pub(super) struct Track {
    stats: PingStats,
    last_answer: Option<Instant>,
    /// The numbers of the pings answered lately.
    answered: VecDeque<u64>,
}

pub(super) type Shared = Arc<Mutex<Track>>;

fn lock(track: &Shared) -> MutexGuard<'_, Track> {
    track.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn snapshot(track: &Shared, now: Instant) -> PingStats {
    let track = lock(track);
    let mut stats = track.stats.clone();
    if let Some(begin) = track.last_answer {
        let length = now.saturating_duration_since(begin);
        if length >= GAP_KEPT {
            stats.gaps.push(Gap { begin, length });
        }
    }
    stats
}

pub(super) fn forget(track: &Shared) {
    let mut track = lock(track);
    track.stats = PingStats::default();
    // A gap that goes on is part of the new phase from now on.
    track.last_answer = track.last_answer.map(|_| Instant::now());
}

impl Track {
    fn answer(&mut self, number: u64, now: Instant) {
        if self.answered.contains(&number) {
            self.stats.duplicates += 1;
            return;
        }
        self.answered.push_back(number);
        if self.answered.len() as u64 > REMEMBERED {
            self.answered.pop_front();
        }
        self.stats.answered += 1;
        if let Some(begin) = self.last_answer {
            let length = now - begin;
            if length >= GAP_KEPT && self.stats.gaps.len() < GAPS_MAX {
                self.stats.gaps.push(Gap { begin, length });
            }
        }
        self.last_answer = Some(now);
    }
}

/// Whom to ping, from its first page on.
pub(super) struct Target {
    pub(super) address: Ipv4Addr,
    pub(super) pings: Shared,
    pub(super) pages: page::Shared,
}

/// Pings until told to stop. The calling thread is in the lab's namespace.
pub(super) fn ping_all_along(targets: &[Target], stop: &AtomicBool) -> Result<()> {
    let os = |what: &'static str| move |e| Error::other(format!("{what}: {e}"));
    let socket = net::socket_with(
        AddressFamily::INET,
        SocketType::RAW,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        Some(net::ipproto::ICMP),
    )
    .map_err(os("cannot open a raw socket"))?;
    let identifier = std::process::id() as u16;
    let mut next = Instant::now();
    for number in 0u64.. {
        if stop.load(Relaxed) {
            break;
        }
        for Target { address, pings, pages } in targets {
            if !page::has_answered(pages) {
                continue;
            }
            let packet = echo_request(identifier, number);
            // An unreachable target is a gap, not an error.
            let to = SocketAddrV4::new(*address, 0);
            let _ = net::sendto(&socket, &packet, net::SendFlags::empty(), &to);
            lock(pings).stats.sent += 1;
        }
        next += INTERVAL;
        receive_until(&socket, next, identifier, targets).map_err(os("cannot receive answers"))?;
        // After a stop of the whole machine: go on, do not catch up.
        next = next.max(Instant::now() - INTERVAL);
    }
    Ok(())
}

fn receive_until(
    socket: &OwnedFd,
    until: Instant,
    identifier: u16,
    targets: &[Target],
) -> rustix::io::Result<()> {
    let mut buffer = [MaybeUninit::uninit(); 2048];
    loop {
        loop {
            match net::recvfrom(socket, &mut buffer, net::RecvFlags::empty()) {
                Ok(((packet, _), _, _)) => {
                    if let Some((from, number)) = parse_reply(packet, identifier)
                        && let Some(target) = targets.iter().find(|t| t.address == from)
                    {
                        lock(&target.pings).answer(number, Instant::now());
                    }
                }
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e),
            }
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        let timeout = Timespec {
            tv_sec: left.as_secs().cast_signed(),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
}

/// The number is in the payload too: the sequence number's 16 bits would wrap.
fn echo_request(identifier: u16, number: u64) -> [u8; 16] {
    let mut packet = [0; 16];
    packet[0] = ECHO_REQUEST;
    packet[4..6].copy_from_slice(&identifier.to_be_bytes());
    packet[6..8].copy_from_slice(&(number as u16).to_be_bytes());
    packet[8..].copy_from_slice(&number.to_be_bytes());
    let sum = checksum(&packet);
    packet[2..4].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// The sender and our number, if this IPv4 packet is an answer to one of ours.
fn parse_reply(packet: &[u8], identifier: u16) -> Option<(Ipv4Addr, u64)> {
    let header = usize::from(packet.first()? & 0xf) * 4;
    let from: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
    let icmp = packet.get(header..)?;
    let ours = *icmp.first()? == ECHO_REPLY && icmp.get(4..6)? == identifier.to_be_bytes();
    let number: [u8; 8] = icmp.get(8..16)?.try_into().ok()?;
    ours.then(|| (Ipv4Addr::from(from), u64::from_be_bytes(number)))
}

/// The internet checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel does not fill in the checksum of a raw ICMP socket: a wrong one is never answered.
    #[test]
    fn a_request_sums_to_zero() {
        let packet = echo_request(0x1234, 70_000);
        assert_eq!(checksum(&packet), 0);
        assert_eq!(packet[6..8], (70_000_u64 as u16).to_be_bytes());
    }

    #[test]
    fn an_answer_is_told_from_others() {
        let mut packet = vec![0; 20];
        packet[0] = 0x45;
        packet[12..16].copy_from_slice(&[10, 78, 0, 11]);
        packet.extend(echo_request(7, 9));
        assert_eq!(parse_reply(&packet, 7), None, "a request");
        packet[20] = ECHO_REPLY;
        assert_eq!(parse_reply(&packet, 7), Some((Ipv4Addr::new(10, 78, 0, 11), 9)));
        assert_eq!(parse_reply(&packet, 8), None, "somebody else's");
        assert_eq!(parse_reply(&packet[..30], 7), None, "cut short");
    }

    /// A gap is from answer to answer; a second answer to one ping is a duplicate, not an answer.
    #[test]
    fn gaps_and_duplicates_are_counted() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut track = Track::default();
        track.answer(0, at(0));
        track.answer(1, at(20));
        track.answer(50, at(1020));
        track.answer(50, at(1021));
        assert_eq!(track.stats.answered, 3);
        assert_eq!(track.stats.duplicates, 1);
        assert_eq!(track.stats.longest_gap(), Duration::from_secs(1));
        let shared = Arc::new(Mutex::new(track));
        let later = snapshot(&shared, at(4020));
        assert_eq!(later.longest_gap(), Duration::from_secs(3), "the one that goes on");
    }
}
