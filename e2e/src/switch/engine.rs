//! The switch's process: sockets, queues, time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::epoll;

use super::control::{self, Request};
use super::forward::{FRAME_BYTES_MIN, Route, Table};
use super::{AddressMove, LinkState, Port, PortReport, Segment, tap};
use crate::host::HOSTS_MAX;
use crate::netns::Netns;
use crate::{Error, Result, paths};

/// Bytes read from a port at once.
const READ_BYTES: usize = 256 << 10;
/// QEMU's own bound on a frame is 68 KiB.
const FRAME_BYTES_MAX: usize = 72 << 10;
/// What waits for a slow reader; beyond it frames are dropped.
const QUEUE_BYTES_MAX: usize = 1 << 20;
/// What waits because of a cable's delay, in all.
const DELAYED_BYTES_MAX: usize = 64 << 20;
/// Frames taken from a TAP before others get their turn.
const TAP_BATCH: usize = 64;
const CONTROL_PATIENCE: Duration = Duration::from_secs(2);

/// Runs the switch of a lab; never returns unless something fails.
pub fn serve(lab: &str) -> Result<()> {
    Netns::named(format!("drover-{lab}")).enter()?;
    Engine::new(&paths::run_dir(lab))?.run()
}

/// What an epoll event is about.
#[derive(Clone, Copy)]
enum Token {
    Control,
    Listener(usize),
    Port(usize),
}

impl Token {
    fn encode(self) -> epoll::EventData {
        epoll::EventData::new_u64(match self {
            Self::Control => 0,
            Self::Listener(n) => 1 << 32 | n as u64,
            Self::Port(n) => 2 << 32 | n as u64,
        })
    }

    fn decode(data: epoll::EventData) -> Self {
        let n = (data.u64() & 0xffff_ffff) as usize;
        match data.u64() >> 32 {
            0 => Self::Control,
            1 => Self::Listener(n),
            _ => Self::Port(n),
        }
    }
}

/// The far end of a port.
enum End {
    None,
    Tap(File),
    Qemu { stream: UnixStream, received: Vec<u8>, filled: usize },
}

struct PortState {
    port: Port,
    listener: Option<UnixListener>,
    end: End,
    link: LinkState,
    /// Framed bytes that QEMU has not taken yet.
    queue: Vec<u8>,
    /// Whether epoll tells when it takes more.
    waits_for_room: bool,
    frames_in: u64,
    bytes_in: u64,
    frames_lost: u64,
    frames_overflowed: u64,
}

/// A frame on a slow cable: due time, a number that keeps the order, from, frame.
type Delayed = Reverse<(Instant, u64, usize, Vec<u8>)>;

struct Engine {
    epoll: rustix::fd::OwnedFd,
    control: UnixListener,
    ports: Vec<PortState>,
    table: Table,
    delayed: BinaryHeap<Delayed>,
    delayed_bytes: usize,
    delayed_count: u64,
    random: u64,
}

impl Engine {
    fn new(run_dir: &Path) -> Result<Self> {
        let epoll =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(os("cannot make an epoll"))?;
        let mut ports = Vec::new();
        for segment in Segment::ALL {
            ports.push(PortState::new(Port::Client(segment), End::Tap(tap::open(segment.tap())?)));
        }
        for number in 1..=HOSTS_MAX {
            for segment in Segment::ALL {
                let port = Port::Host(number, segment);
                let mut state = PortState::new(port, End::None);
                state.listener = Some(listen(&port.socket(run_dir))?);
                ports.push(state);
            }
        }
        for (index, state) in ports.iter().enumerate() {
            if let Some(listener) = &state.listener {
                add(&epoll, listener, Token::Listener(index))?;
            }
            if let End::Tap(file) = &state.end {
                add(&epoll, file, Token::Port(index))?;
            }
        }
        // Last: that this socket is there says that all is ready.
        let control = listen(&control::socket(run_dir))?;
        add(&epoll, &control, Token::Control)?;
        let random = u64::from(std::process::id()) << 32 | 0x9e37_79b9;
        Ok(Self {
            epoll,
            control,
            ports,
            table: Table::default(),
            delayed: BinaryHeap::new(),
            delayed_bytes: 0,
            delayed_count: 0,
            random,
        })
    }

    fn run(&mut self) -> Result<()> {
        let mut buffer = vec![0; FRAME_BYTES_MAX];
        let mut events = Vec::with_capacity(64);
        loop {
            events.clear();
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                self.timeout().as_ref(),
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(os("epoll failed")(e)),
            }
            for event in &events {
                match Token::decode(event.data) {
                    Token::Control => self.answer_control(),
                    Token::Listener(index) => self.accept(index),
                    Token::Port(index) => self.receive(index, &mut buffer),
                }
            }
            self.release_delayed();
            for index in 0..self.ports.len() {
                self.flush(index);
            }
        }
    }

    /// Until the next delayed frame is due.
    fn timeout(&self) -> Option<rustix::event::Timespec> {
        let Reverse((due, ..)) = self.delayed.peek()?;
        let left = due.saturating_duration_since(Instant::now());
        Some(rustix::event::Timespec {
            tv_sec: left.as_secs().cast_signed(),
            tv_nsec: i64::from(left.subsec_nanos()),
        })
    }

    fn accept(&mut self, index: usize) {
        let accepted = self.ports[index].listener.as_ref().map(UnixListener::accept);
        let Some(Ok((stream, _))) = accepted else { return };
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        if add(&self.epoll, &stream, Token::Port(index)).is_ok() {
            let state = &mut self.ports[index];
            state.queue.clear();
            state.waits_for_room = false;
            state.end = End::Qemu { stream, received: vec![0; READ_BYTES], filled: 0 };
        }
    }

    fn disconnect(&mut self, index: usize) {
        // Closing the descriptor takes it out of epoll.
        self.ports[index].end = End::None;
        self.ports[index].queue.clear();
        self.ports[index].waits_for_room = false;
        self.table.forget(index);
    }

    fn receive(&mut self, index: usize, buffer: &mut [u8]) {
        // Taken out while its frames are handed to the other ports.
        match std::mem::replace(&mut self.ports[index].end, End::None) {
            End::None => {}
            End::Tap(mut file) => {
                for _ in 0..TAP_BATCH {
                    let Ok(n) = file.read(buffer) else { break };
                    self.incoming(index, &buffer[..n]);
                }
                self.ports[index].end = End::Tap(file);
            }
            End::Qemu { mut stream, mut received, mut filled } => {
                let good = match stream.read(&mut received[filled..]) {
                    Ok(0) => false,
                    Ok(n) => {
                        filled += n;
                        self.split(index, &mut received, &mut filled)
                    }
                    Err(e) => e.kind() == io::ErrorKind::WouldBlock,
                };
                if good {
                    self.ports[index].end = End::Qemu { stream, received, filled };
                } else {
                    self.disconnect(index);
                }
            }
        }
    }

    /// Takes the whole frames out of what was received; false when it makes no sense.
    fn split(&mut self, index: usize, received: &mut [u8], filled: &mut usize) -> bool {
        let mut at = 0;
        while *filled - at >= 4 {
            let head = &received[at..at + 4];
            let length = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
            if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&length) {
                eprintln!("{}: a frame of {length} bytes: unplugged", self.ports[index].port);
                return false;
            }
            if *filled - at - 4 < length {
                break;
            }
            self.incoming(index, &received[at + 4..at + 4 + length]);
            at += 4 + length;
        }
        received.copy_within(at..*filled, 0);
        *filled -= at;
        true
    }

    /// A frame has come in.
    fn incoming(&mut self, from: usize, frame: &[u8]) {
        let state = &mut self.ports[from];
        state.frames_in += 1;
        state.bytes_in += frame.len() as u64;
        if self.is_lost(from) {
            return;
        }
        match self.ports[from].link.delay_ms {
            0 => self.forward(from, frame),
            ms => self.delay(Duration::from_millis(u64::from(ms)), from, frame.to_vec()),
        }
    }

    /// Whether the cable at this port loses the frame; counts it.
    fn is_lost(&mut self, index: usize) -> bool {
        let link = self.ports[index].link;
        let lost = link.cut || (link.drop > 0.0 && self.chance() < link.drop);
        self.ports[index].frames_lost += u64::from(lost);
        lost
    }

    /// The next of a row of numbers between 0 and 1 (xorshift).
    fn chance(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1u64 << 53) as f64
    }

    fn delay(&mut self, time: Duration, from: usize, frame: Vec<u8>) {
        if self.delayed_bytes + frame.len() > DELAYED_BYTES_MAX {
            self.ports[from].frames_overflowed += 1;
            return;
        }
        self.delayed_bytes += frame.len();
        self.delayed_count += 1;
        self.delayed.push(Reverse((Instant::now() + time, self.delayed_count, from, frame)));
    }

    fn release_delayed(&mut self) {
        let now = Instant::now();
        while self.delayed.peek().is_some_and(|Reverse((due, ..))| *due <= now) {
            let Some(Reverse((_, _, from, frame))) = self.delayed.pop() else { return };
            self.delayed_bytes -= frame.len();
            self.forward(from, &frame);
        }
    }

    fn forward(&mut self, from: usize, frame: &[u8]) {
        let segment = self.ports[from].port.segment();
        match self.table.route(segment, from, frame) {
            Route::Nowhere => {}
            Route::To(to) => self.send(to, frame),
            Route::Flood => {
                for to in 0..self.ports.len() {
                    if to != from && self.ports[to].port.segment() == segment {
                        self.send(to, frame);
                    }
                }
            }
        }
    }

    fn send(&mut self, to: usize, frame: &[u8]) {
        if self.is_lost(to) {
            return;
        }
        let state = &mut self.ports[to];
        match &mut state.end {
            End::None => {}
            // A TAP that is full or down drops the frame, as a NIC does.
            End::Tap(file) => state.frames_overflowed += u64::from(file.write(frame).is_err()),
            End::Qemu { .. } if state.queue.len() + frame.len() > QUEUE_BYTES_MAX => {
                state.frames_overflowed += 1;
            }
            End::Qemu { .. } => {
                state.queue.extend_from_slice(&(frame.len() as u32).to_be_bytes());
                state.queue.extend_from_slice(frame);
            }
        }
    }

    /// Hands QEMU what waits for it, as much as it takes.
    fn flush(&mut self, index: usize) {
        let state = &mut self.ports[index];
        let End::Qemu { stream, .. } = &mut state.end else { return };
        if !state.queue.is_empty() {
            match stream.write(&state.queue) {
                Ok(n) => {
                    state.queue.drain(..n);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return self.disconnect(index),
            }
        }
        let wants_room = !state.queue.is_empty();
        if wants_room != state.waits_for_room {
            let mut flags = epoll::EventFlags::IN;
            flags.set(epoll::EventFlags::OUT, wants_room);
            state.waits_for_room = wants_room;
            if epoll::modify(&self.epoll, &*stream, Token::Port(index).encode(), flags).is_err() {
                self.disconnect(index);
            }
        }
    }

    fn answer_control(&mut self) {
        let Ok((stream, _)) = self.control.accept() else { return };
        // Whoever asks waits for the answer; a failure is its own to see.
        if let Err(error) = self.answer(stream) {
            eprintln!("control: {error}");
        }
    }

    fn answer(&mut self, mut stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(CONTROL_PATIENCE))?;
        stream.set_write_timeout(Some(CONTROL_PATIENCE))?;
        let mut line = String::new();
        BufReader::new(io::Read::take(&stream, 4096)).read_line(&mut line)?;
        let mut text = match serde_json::from_str(&line)? {
            Request::Moves => serde_json::to_string(&self.moves())?,
            Request::Report => serde_json::to_string(&self.report())?,
            Request::Set { port, link } => {
                self.set(port, link);
                serde_json::to_string(&self.report())?
            }
        };
        text.push('\n');
        stream.write_all(text.as_bytes())
    }

    fn set(&mut self, port: Port, link: LinkState) {
        if let Some(index) = self.ports.iter().position(|p| p.port == port) {
            self.ports[index].link = link;
            if link.cut {
                self.table.forget(index);
            }
        }
    }

    fn moves(&self) -> Vec<AddressMove> {
        let text = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
        let moves = self.table.moves().iter();
        moves.map(|m| AddressMove { mac: text(m.mac), port: self.ports[m.port].port }).collect()
    }

    fn report(&self) -> Vec<PortReport> {
        self.ports
            .iter()
            .map(|state| PortReport {
                port: state.port,
                connected: !matches!(state.end, End::None),
                link: state.link,
                frames_in: state.frames_in,
                bytes_in: state.bytes_in,
                frames_lost: state.frames_lost,
                frames_overflowed: state.frames_overflowed,
            })
            .collect()
    }
}

impl PortState {
    fn new(port: Port, end: End) -> Self {
        Self {
            port,
            listener: None,
            end,
            link: LinkState::default(),
            queue: Vec::new(),
            waits_for_room: false,
            frames_in: 0,
            bytes_in: 0,
            frames_lost: 0,
            frames_overflowed: 0,
        }
    }
}

fn listen(path: &Path) -> Result<UnixListener> {
    let listener = UnixListener::bind(path).map_err(Error::io("cannot listen on", path))?;
    listener.set_nonblocking(true).map_err(Error::io("cannot listen on", path))?;
    Ok(listener)
}

fn add(epoll: &rustix::fd::OwnedFd, fd: impl AsFd, token: Token) -> Result<()> {
    epoll::add(epoll, fd, token.encode(), epoll::EventFlags::IN).map_err(os("cannot add to epoll"))
}

fn os(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> Error {
    move |e| Error::other(format!("{what}: {e}"))
}
