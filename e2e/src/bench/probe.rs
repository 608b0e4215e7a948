//! What a customer would notice: pings at a steady pace, and the longest silence between replies.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto, sockopt};

use crate::{Error, Result};

const INTERVAL: Duration = Duration::from_millis(10);

/// A stream of pings that runs until it is asked what it saw.
pub(super) struct Probe {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Duration>>,
}

impl Probe {
    pub(super) fn start(ip: Ipv4Addr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            ping(ip, &stopped).map_err(|e| Error::other(format!("ping {ip}: {e}")))
        });
        Self { stop, thread }
    }

    /// The longest time between two replies, up to now.
    pub(super) fn finish(self) -> Result<Duration> {
        self.stop.store(true, Relaxed);
        self.thread.join().unwrap_or_else(|_| Err(Error::other("the ping thread panicked")))
    }
}

fn ping(ip: Ipv4Addr, stop: &AtomicBool) -> std::io::Result<Duration> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP))?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(INTERVAL))?;
    rustix::net::connect(&socket, &SocketAddrV4::new(ip, 0))?;
    let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
    let mut next = Instant::now();
    let mut sequence: u16 = 0;
    let mut buffer = [0; 256];
    while !stop.load(Relaxed) {
        if Instant::now() >= next {
            sequence = sequence.wrapping_add(1);
            // A full queue is silence, and is counted as such.
            let _ = rustix::net::send(&socket, &echo_request(sequence), SendFlags::DONTWAIT);
            next += INTERVAL;
        }
        match rustix::net::recv(&socket, &mut buffer[..], RecvFlags::empty()) {
            // A reply: type 0 after 20 bytes of IP.
            Ok((length, _)) if length >= 28 && buffer[20] == 0 => {
                longest = longest.max(last.elapsed());
                last = Instant::now();
            }
            Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(longest.max(last.elapsed()))
}

fn echo_request(sequence: u16) -> [u8; 16] {
    let mut packet = [0; 16];
    packet[0] = 8;
    packet[4..6].copy_from_slice(&0xd0e4_u16.to_be_bytes());
    packet[6..8].copy_from_slice(&sequence.to_be_bytes());
    let sum: u32 =
        packet.chunks_exact(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    packet[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    packet
}
