//! A connection: framed messages, each with a time in which the other side must move.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::alarm::Alarm;
use super::wire::{self, HEADER_BYTES, Kind};
use super::{IDLE_TIMEOUT, MigrationError};

/// How often a connection that is being made looks whether it is still wanted.
const CONNECT_POLL: Duration = Duration::from_millis(100);
/// Silence after which the kernel asks whether the other side is there.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// Messages in which the other side's last words are looked for.
const LAST_WORDS_MAX: u32 = 8;

/// A connection to the other side.
pub(super) struct Link {
    stream: TcpStream,
    /// When something was last sent.
    spoke: Instant,
}

/// A message; the data of PAGES and DISK are still in the socket.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) kind: Kind,
    /// Empty for PAGES and DISK.
    pub(super) payload: Vec<u8>,
    /// For PAGES and DISK: bytes that follow.
    pub(super) length: usize,
    /// For HELLO and WELCOME: how many connections.
    pub(super) connections: u16,
}

impl Link {
    /// Connects to the first of the host's addresses that answers.
    pub(super) fn connect(
        address: &str,
        timeout: Duration,
        wanted: impl Fn() -> bool,
    ) -> Result<Self, MigrationError> {
        let failed = MigrationError::link("connecting to the destination");
        let addresses = match address.to_socket_addrs() {
            Ok(addresses) => addresses,
            Err(error) => return Err(failed(error)),
        };
        let deadline = Instant::now() + timeout;
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in addresses {
            match connect_one(address, deadline, &wanted) {
                Ok(stream) => return Self::new(stream),
                Err(_) if !wanted() => return Err(MigrationError::Cancelled),
                Err(error) => last = error,
            }
        }
        Err(failed(last))
    }

    /// Takes a connection that was made.
    pub(super) fn new(stream: TcpStream) -> Result<Self, MigrationError> {
        let configure = || {
            stream.set_nonblocking(false)?;
            stream.set_nodelay(true)?;
            stream.set_write_timeout(Some(IDLE_TIMEOUT))?;
            sockopt::set_socket_keepalive(&stream, true)?;
            sockopt::set_tcp_keepidle(&stream, KEEPALIVE)?;
            sockopt::set_tcp_keepintvl(&stream, KEEPALIVE)?;
            sockopt::set_tcp_user_timeout(&stream, IDLE_TIMEOUT.as_millis() as u32)?;
            Ok(())
        };
        configure().map_err(MigrationError::link("setting up the connection"))?;
        Ok(Self { stream, spoke: Instant::now() })
    }

    /// Another handle, to shut the connection down with.
    pub(super) fn handle(&self) -> Result<TcpStream, MigrationError> {
        self.stream.try_clone().map_err(MigrationError::link("setting up the connection"))
    }

    /// Waits for the other side's next bytes, or for the alarm, which counts first.
    pub(super) fn await_word(
        &self,
        alarm: &Alarm,
        timeout: Duration,
    ) -> Result<(), MigrationError> {
        let deadline = Instant::now() + timeout;
        loop {
            alarm.check()?;
            let left = deadline.saturating_duration_since(Instant::now());
            let readable = wait_for(&[self.stream.as_fd(), alarm.fd()], Some(left))
                .map_err(MigrationError::link("receiving"))?;
            match readable[..] {
                [_, true] => alarm.calm(),
                [true, false] => return Ok(()),
                _ if left.is_zero() => {
                    let source = io::ErrorKind::TimedOut.into();
                    return Err(MigrationError::Link { step: "receiving", source });
                }
                _ => {}
            }
        }
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// For how long nothing was sent.
    pub(super) fn silent_for(&self) -> Duration {
        self.spoke.elapsed()
    }

    /// Sends a message.
    pub(super) fn send(&mut self, kind: Kind, payload: &[u8]) -> Result<(), MigrationError> {
        self.send_framed(wire::header(kind, payload.len()), payload)
    }

    /// Sends HELLO or WELCOME, with a number of connections.
    pub(super) fn greet(
        &mut self,
        kind: Kind,
        payload: &[u8],
        connections: u16,
    ) -> Result<(), MigrationError> {
        self.send_framed(wire::greeting(kind, payload.len(), connections), payload)
    }

    fn send_framed(
        &mut self,
        header: [u8; HEADER_BYTES],
        payload: &[u8],
    ) -> Result<(), MigrationError> {
        let mut buffers = [buffer(&header), buffer(payload)];
        // SAFETY: both buffers are slices that live during the call.
        unsafe { self.send_buffers(&mut buffers) }
    }

    /// Sends these buffers, all of them.
    ///
    /// # Safety
    /// They must be readable memory during the call.
    pub(super) unsafe fn send_buffers(
        &mut self,
        buffers: &mut [libc::iovec],
    ) -> Result<(), MigrationError> {
        let fd = self.stream.as_raw_fd();
        let each = |buffers: &[libc::iovec]| {
            // SAFETY: the caller vouches for the buffers, and the count is theirs.
            unsafe { libc::writev(fd, buffers.as_ptr(), buffers.len() as libc::c_int) }
        };
        transfer(buffers, each).map_err(MigrationError::link("sending"))?;
        self.spoke = Instant::now();
        Ok(())
    }

    /// Fills these buffers, all of them.
    ///
    /// # Safety
    /// They must be writable memory during the call, to which nothing holds a reference.
    pub(super) unsafe fn receive_buffers(
        &mut self,
        buffers: &mut [libc::iovec],
    ) -> Result<(), MigrationError> {
        let fd = self.stream.as_raw_fd();
        let each = |buffers: &[libc::iovec]| {
            // SAFETY: the caller vouches for the buffers, and the count is theirs.
            unsafe { libc::readv(fd, buffers.as_ptr(), buffers.len() as libc::c_int) }
        };
        transfer(buffers, each).map_err(MigrationError::link("receiving"))?;
        Ok(())
    }

    pub(super) fn receive_exact(&mut self, bytes: &mut [u8]) -> Result<(), MigrationError> {
        let buffer = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: the buffer is `bytes`, borrowed mutably.
        unsafe { self.receive_buffers(&mut [buffer]) }
    }

    /// Receives a message; the other side may be silent for `timeout`.
    pub(super) fn receive(&mut self, timeout: Duration) -> Result<Received, MigrationError> {
        self.receive_if(|_| true, timeout)
    }

    /// The same; a message of a kind that is not wanted is not read on.
    fn receive_if(
        &mut self,
        wanted: impl Fn(Kind) -> bool,
        timeout: Duration,
    ) -> Result<Received, MigrationError> {
        self.stream.set_read_timeout(Some(timeout)).map_err(MigrationError::link("receiving"))?;
        let mut header = [0; HEADER_BYTES];
        self.receive_exact(&mut header)?;
        let (kind, length) = wire::parse_header(header).map_err(protocol)?;
        if !wanted(kind) {
            return Err(MigrationError::Protocol(format!("{kind:?} has no place here")));
        }
        let connections = wire::connections(&header);
        let mut payload = Vec::new();
        if !matches!(kind, Kind::Pages | Kind::Disk) {
            payload.resize(length, 0);
            self.receive_exact(&mut payload)?;
        }
        Ok(Received { kind, payload, length, connections })
    }

    /// Receives the first message of somebody who may be anybody.
    pub(super) fn first(
        &mut self,
        wanted: Kind,
        timeout: Duration,
    ) -> Result<Received, MigrationError> {
        self.receive_if(|kind| kind == wanted, timeout)
    }

    /// Receives the one message that may come now.
    pub(super) fn expect(
        &mut self,
        wanted: Kind,
        timeout: Duration,
    ) -> Result<Vec<u8>, MigrationError> {
        Ok(self.answer(wanted, timeout)?.payload)
    }

    /// The same, with what its header says.
    pub(super) fn answer(
        &mut self,
        wanted: Kind,
        timeout: Duration,
    ) -> Result<Received, MigrationError> {
        let message = self.receive(timeout)?;
        match message.kind {
            kind if kind == wanted => Ok(message),
            Kind::Refuse => Err(MigrationError::Refused(reason(&message.payload)?)),
            Kind::Abort => Err(MigrationError::Aborted(reason(&message.payload)?)),
            kind => Err(MigrationError::Protocol(format!("{kind:?} in place of {wanted:?}"))),
        }
    }

    /// What the other side said before it went: better than a broken pipe.
    pub(super) fn last_words(&mut self) -> Option<MigrationError> {
        const PATIENCE: Duration = Duration::from_millis(200);
        for _ in 0..LAST_WORDS_MAX {
            let message = self.receive(PATIENCE).ok()?;
            match message.kind {
                Kind::Abort => return reason(&message.payload).ok().map(MigrationError::Aborted),
                Kind::Pages | Kind::Disk => {
                    self.receive_exact(&mut vec![0; message.length]).ok()?
                }
                _ => {}
            }
        }
        None
    }

    pub(super) fn close(&self) {
        // It may be gone already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

pub(super) fn reason(payload: &[u8]) -> Result<String, MigrationError> {
    wire::decode_reason(payload).map_err(protocol)
}

pub(super) fn protocol(error: crate::state::StateError) -> MigrationError {
    MigrationError::Protocol(error.to_string())
}

pub(super) fn buffer(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

/// Calls until all buffers are through; each call moves the front.
fn transfer(
    mut buffers: &mut [libc::iovec],
    call: impl Fn(&[libc::iovec]) -> libc::ssize_t,
) -> io::Result<u64> {
    let mut total = 0;
    loop {
        while buffers.first().is_some_and(|buffer| buffer.iov_len == 0) {
            buffers = &mut buffers[1..];
        }
        if buffers.is_empty() {
            return Ok(total);
        }
        let mut done = match call(buffers) {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            done @ 1.. => done.unsigned_abs(),
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                error => return Err(error),
            },
        };
        total += done as u64;
        for buffer in buffers.iter_mut() {
            let here = done.min(buffer.iov_len);
            buffer.iov_base = buffer.iov_base.wrapping_byte_add(here);
            buffer.iov_len -= here;
            done -= here;
            if done == 0 {
                break;
            }
        }
    }
}

/// Waits until one of these is readable (or broken), or the time is over; answers which are.
pub(super) fn wait_for(fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<Vec<bool>> {
    let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    let timeout = timeout.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
    match poll(&mut polled, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(polled.iter().map(|fd| !fd.revents().is_empty()).collect())
}

fn connect_one(
    address: SocketAddr,
    deadline: Instant,
    wanted: &impl Fn() -> bool,
) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) => return Ok(socket.into()),
        Err(rustix::io::Errno::INPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    loop {
        let now = Instant::now();
        if now >= deadline || !wanted() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let wait = CONNECT_POLL.min(deadline - now);
        let mut fds = [PollFd::new(&socket, PollFlags::OUT)];
        let timeout = Timespec::try_from(wait).map_err(io::Error::other)?;
        if poll(&mut fds, Some(&timeout))? > 0 {
            sockopt::socket_error(&socket)??;
            return Ok(socket.into());
        }
    }
}
