//! The virtio side: features, configuration, turns, answers.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use vm_memory::Bytes;

use super::backend::{self, Backend, Buffers, Done, Job, Reply, Work, wait_readable};
use super::limits::{Cost, Limits, Throttle};
use super::requests::{
    DISCARD_SECTORS_MAX, ID_BYTES, RANGES_MAX, Request, Rules, Span, Status, ZERO_SECTORS_MAX,
    parse,
};
use super::volume::{SECTOR_BYTES, Volume, VolumeError};
use crate::memory::GuestMemory;
use crate::pci::ClassCode;
use crate::state::{Decoder, Encoder, StateError, kind};
use crate::virtio::buffers::{gather, mark_written};
use crate::virtio::{
    DeviceKind, Errand, Event, Interrupt, Progress, Segment, Turn, Violation, VirtioDevice,
};

/// Most queues: more than this many vCPUs share them.
pub(super) const QUEUES_MAX: usize = 4;
const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: [u16; QUEUES_MAX] = [QUEUE_SIZE; QUEUES_MAX];
/// Buffers of one request besides its header and its status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Requests that are begun in one turn, and their bytes: what lies in the page cache is copied
/// within the turn.
const TURN_REQUESTS_MAX: usize = 64;
const TURN_BYTES_MAX: u64 = 16 << 20;
/// Bytes after which what was begun is handed over within a turn, so that the driver is told of it
/// and works on while the rest is copied.
const HAND_OVER_BYTES: u64 = 256 << 10;
/// Bytes that may be under way before the queues are left alone: what a pause or a reset may have
/// to wait for. One more request may go beyond it.
pub(super) const UNDER_WAY_BYTES_MAX: u64 = 256 << 20;
/// When the system had no room for requests, they are tried again so much later.
const RETRY: Duration = Duration::from_millis(10);
/// Errors of the volume that are logged in the machine's life: a guest must not fill a log.
const ERRORS_LOGGED_MAX: u32 = 8;

/// The device.
pub struct Blk {
    // Before the memory that its jobs point into.
    backend: Box<dyn Backend>,
    memory: GuestMemory,
    volume: Arc<Volume>,
    serial: [u8; ID_BYTES],
    queues: usize,
    features: u64,
    /// Requests that are under way, queue by queue.
    in_flight: [u16; QUEUES_MAX],
    /// Their bytes.
    bytes_under_way: u64,
    /// Queues that were left alone because of these, one bit each.
    left_alone: u8,
    /// The system had no room for all that was begun; then it is tried again.
    retry: Option<Instant>,
    throttle: Throttle,
    segments: Vec<Segment>,
    done: Vec<Done>,
    errors: u32,
}

impl std::fmt::Debug for Blk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Blk").field("volume", &self.volume).finish_non_exhaustive()
    }
}

impl Blk {
    /// A device with this volume, for a guest with this memory and so many vCPUs. `serial` is
    /// cut to 20 bytes.
    ///
    /// # Errors
    /// When the system has no descriptors left.
    pub fn new(volume: Volume, serial: &str, vcpus: u32, memory: GuestMemory) -> io::Result<Self> {
        let volume = Arc::new(volume);
        let queues = (vcpus as usize).clamp(1, QUEUES_MAX);
        let jobs_max = queues as u32 * u32::from(QUEUE_SIZE);
        let backend = backend::best(&volume, jobs_max)?;
        Ok(Self::with_backend(backend, volume, serial, queues, memory))
    }

    pub(super) fn with_backend(
        backend: Box<dyn Backend>,
        volume: Arc<Volume>,
        serial: &str,
        queues: usize,
        memory: GuestMemory,
    ) -> Self {
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Self {
            backend,
            memory,
            volume,
            serial: id,
            queues,
            features: 0,
            in_flight: [0; QUEUES_MAX],
            bytes_under_way: 0,
            left_alone: 0,
            retry: None,
            throttle: Throttle::default(),
            segments: Vec::new(),
            done: Vec::new(),
            errors: 0,
        }
    }

    /// Limits what the guest may ask for from now on.
    pub fn set_limits(&mut self, limits: Limits, now: Instant) {
        self.throttle.set(limits, now);
    }

    /// The volume has grown: the guest is told. Answers its length before and now, in bytes.
    ///
    /// # Errors
    /// When it has not grown but shrunk; then nothing has changed.
    pub fn grow(&mut self, interrupt: &Interrupt) -> Result<(u64, u64), VolumeError> {
        let (before, now) = self.volume.measure_again()?;
        if now > before {
            interrupt.raise_config();
        }
        Ok((before, now))
    }

    /// Its volume.
    pub fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    fn rules(&self) -> Rules {
        Rules {
            sectors: self.volume.sectors(),
            read_only: self.volume.is_read_only(),
            discard: self.has(VIRTIO_BLK_F_DISCARD),
            write_zeroes: self.has(VIRTIO_BLK_F_WRITE_ZEROES),
        }
    }

    /// Begins what the driver has put into a queue.
    fn take(&mut self, turn: &mut Turn<'_>, index: usize) -> Result<Progress, Violation> {
        let result = self.take_requests(turn, index);
        // Whatever came of it: what was begun goes on.
        self.hand_over(turn)?;
        result
    }

    /// Submits what was begun, and tells the driver of what is done already: what lies in the page
    /// cache mostly is.
    fn hand_over(&mut self, turn: &mut Turn<'_>) -> Result<(), Violation> {
        self.submit(turn.now);
        self.finish(Some(&mut *turn))?;
        if self.retry.is_none() {
            // The rest of what was done by part.
            self.submit(turn.now);
        }
        Ok(())
    }

    fn take_requests(&mut self, turn: &mut Turn<'_>, index: usize) -> Result<Progress, Violation> {
        let rules = self.rules();
        let (mut bytes, mut handed_over) = (0, 0);
        turn.queues[index].disable_kicks(turn.memory)?;
        for _ in 0..TURN_REQUESTS_MAX {
            if self.bytes_under_way >= UNDER_WAY_BYTES_MAX {
                // Looked at again when some of them are done.
                self.left_alone |= 1 << index;
                self.throttle.leave(index, turn.now);
                return Ok(Progress::Done);
            }
            let queue = &mut turn.queues[index];
            let Some(head) = queue.pop(turn.memory, &mut self.segments)? else {
                if self.backend.has_errand() {
                    // The worker is back in a moment and looks again: until then a kick, which
                    // costs the guest an exit, tells it nothing.
                    self.throttle.leave(index, turn.now);
                    return Ok(Progress::More);
                }
                if queue.enable_kicks(turn.memory)? {
                    continue;
                }
                self.throttle.leave(index, turn.now);
                return Ok(Progress::Done);
            };
            if self.in_flight[index] >= queue.size() {
                let what = "is in the queue while more than the queue holds is under way";
                return Err(Violation::Shape { queue: index, head, what });
            }
            let Some(begun) = self.begin(turn, index, head, &rules)? else {
                // Looked at again when there is budget for it.
                turn.queues[index].rewind(1);
                return Ok(Progress::Done);
            };
            bytes += begun;
            if bytes > TURN_BYTES_MAX {
                break;
            }
            if bytes - handed_over >= HAND_OVER_BYTES {
                self.hand_over(turn)?;
                handed_over = bytes;
            }
        }
        Ok(Progress::More)
    }

    /// Looks again at the queue that has waited for budget.
    fn take_due(&mut self, turn: &mut Turn<'_>) -> Result<(), Violation> {
        if let Some(index) = self.throttle.due(turn.now)
            && self.take(turn, index)? == Progress::More
        {
            self.throttle.look_again(turn.now);
        }
        Ok(())
    }

    /// Looks again at the queues that were left alone, if there is room.
    fn take_again(&mut self, turn: &mut Turn<'_>) -> Result<(), Violation> {
        if !self.has_room_again() {
            return Ok(());
        }
        let left_alone = std::mem::take(&mut self.left_alone);
        for index in (0..self.queues).filter(|index| left_alone & 1 << index != 0) {
            if self.take(turn, index)? == Progress::More {
                self.left_alone |= 1 << index;
            }
        }
        Ok(())
    }

    /// Whether queues were left alone for which there is room.
    fn has_room_again(&self) -> bool {
        self.left_alone != 0 && self.bytes_under_way < UNDER_WAY_BYTES_MAX
    }

    /// Begins the request whose buffers are in `segments`, or answers it at once. Answers how
    /// many bytes it moves, and nothing when there is no budget for it.
    fn begin(
        &mut self,
        turn: &mut Turn<'_>,
        index: usize,
        head: u16,
        rules: &Rules,
    ) -> Result<Option<u64>, Violation> {
        let parsed = parse(turn.memory, &self.segments, rules)
            .map_err(|what| Violation::Shape { queue: index, head, what })?;
        let cost = parsed.request.as_ref().map_or_else(|_| Cost::default(), Cost::of);
        if !self.throttle.pay(index, cost, turn.now) {
            return Ok(None);
        }
        let mut reply = Reply {
            queue: index,
            head,
            status: parsed.status,
            room_bytes: parsed.room_bytes,
            answer_bytes: 0,
            moved_bytes: 0,
            changes: Vec::new(),
            written: Vec::new(),
        };
        let durable = !self.has(VIRTIO_BLK_F_FLUSH);
        let (work, bytes) = match parsed.request {
            Err(status) => return answer(turn, &reply, status).map(|()| Some(0)),
            Ok(Request::Id(room)) => {
                let status = self.write_id(&room);
                reply.answer_bytes = parsed.room_bytes.min(ID_BYTES as u64);
                return answer(turn, &reply, status).map(|()| Some(0));
            }
            Ok(Request::Read { offset, data }) => {
                let Some(buffers) = buffers(turn.memory, &data) else {
                    return answer(turn, &reply, Status::IoError).map(|()| Some(0));
                };
                reply.written = data;
                reply.answer_bytes = parsed.room_bytes;
                (Work::Read { offset, buffers }, parsed.room_bytes)
            }
            Ok(Request::Write { offset, data }) => {
                let Some(buffers) = buffers(turn.memory, &data) else {
                    return answer(turn, &reply, Status::IoError).map(|()| Some(0));
                };
                let bytes = data.iter().map(|segment| u64::from(segment.len)).sum();
                (Work::Write { offset, buffers, durable }, bytes)
            }
            Ok(Request::Flush) => (Work::Flush, 0),
            Ok(Request::Discard(spans)) => (Work::Discard { spans, durable }, 0),
            Ok(Request::WriteZeroes(spans)) => {
                let bytes = spans.iter().map(|span| span.bytes).sum();
                (Work::Zero { spans, durable }, bytes)
            }
        };
        if work.is_nothing() {
            return answer(turn, &reply, Status::Ok).map(|()| Some(0));
        }
        self.in_flight[index] += 1;
        self.bytes_under_way += bytes;
        reply.moved_bytes = bytes;
        reply.changes = work.changes();
        self.volume.tracker().mark_all(&reply.changes);
        // SAFETY: `buffers` made the pointers from slices of guest memory. `self.memory` keeps it
        // mapped for longer than the backend exists; nothing here holds a reference into it.
        unsafe { self.backend.start(Job { work, reply }) };
        Ok(Some(bytes))
    }

    /// Writes the serial number into these, as much of it as fits.
    fn write_id(&self, room: &[Segment]) -> Status {
        let mut left = &self.serial[..];
        for segment in room {
            let (now, later) = left.split_at(left.len().min(segment.len as usize));
            if self.memory.write_slice(now, segment.addr).is_err() {
                return Status::IoError;
            }
            left = later;
        }
        Status::Ok
    }

    fn submit(&mut self, now: Instant) {
        let all = self.backend.submit();
        self.retry = (!all).then(|| now + RETRY);
    }

    /// Takes back what is done, and tells the driver if there is one.
    fn finish(&mut self, mut turn: Option<&mut Turn<'_>>) -> Result<(), Violation> {
        let mut done = std::mem::take(&mut self.done);
        self.backend.finished(&mut done);
        let mut result = Ok(());
        for Done { job, result: outcome } in done.drain(..) {
            let Job { work, reply } = job;
            // Well or not; it may have been read while it was under way.
            self.volume.tracker().mark_all(&reply.changes);
            let status = self.status(&work, outcome);
            // The kernel wrote past `vm-memory`, by part even when it failed.
            mark_written(&self.memory, reply.written.iter(), usize::MAX);
            self.in_flight[reply.queue] -= 1;
            self.bytes_under_way -= reply.moved_bytes;
            if let (Some(turn), true) = (&mut turn, result.is_ok()) {
                result = answer(turn, &reply, status);
            }
        }
        self.done = done;
        if let (Some(turn), Ok(())) = (turn, &result) {
            for queue in turn.queues.iter_mut().filter(|queue| queue.ready()) {
                queue.notify(turn.memory, turn.interrupt)?;
            }
        }
        result
    }

    fn status(&mut self, work: &Work, outcome: io::Result<()>) -> Status {
        let Err(error) = outcome else { return Status::Ok };
        if error.raw_os_error() == Some(libc::EOPNOTSUPP) {
            return Status::Unsupported;
        }
        if self.errors < ERRORS_LOGGED_MAX {
            self.errors += 1;
            tracing::error!(%error, request = work.name(), "the volume has failed a request");
        }
        Status::IoError
    }

    /// Waits for all that is under way, or until the deadline. Answers how much still is.
    fn drain(
        &mut self,
        mut turn: Option<&mut Turn<'_>>,
        deadline: Instant,
    ) -> Result<usize, Violation> {
        self.backend.recall();
        while self.backend.in_flight() > 0 {
            let now = Instant::now();
            self.submit(now);
            self.finish(turn.as_deref_mut())?;
            if self.backend.in_flight() > 0 {
                if now >= deadline {
                    return Ok(self.backend.in_flight());
                }
                let until = self.retry.map_or(deadline, |retry| retry.min(deadline));
                wait_readable(self.backend.fd(), until.saturating_duration_since(now));
            }
        }
        self.retry = None;
        Ok(0)
    }
}

impl Work {
    fn name(&self) -> &'static str {
        match self {
            Self::Read { .. } => "read",
            Self::Write { .. } => "write",
            Self::Flush => "flush",
            Self::Discard { .. } => "discard",
            Self::Zero { .. } => "write zeroes",
        }
    }

    /// Bytes of the volume that it changes.
    fn changes(&self) -> Vec<Span> {
        match self {
            Self::Write { offset, buffers, .. } => {
                vec![Span { offset: *offset, bytes: buffers.bytes(), unmap: false }]
            }
            Self::Discard { spans, .. } | Self::Zero { spans, .. } => spans.clone(),
            Self::Read { .. } | Self::Flush => Vec::new(),
        }
    }

    /// Whether there is nothing to do: a request for no bytes.
    fn is_nothing(&self) -> bool {
        match self {
            Self::Read { buffers, .. } | Self::Write { buffers, .. } => buffers.is_empty(),
            Self::Flush => false,
            Self::Discard { spans, .. } | Self::Zero { spans, .. } => spans.is_empty(),
        }
    }
}

/// Pointers to these segments' memory.
fn buffers(memory: &GuestMemory, segments: &[Segment]) -> Option<Buffers> {
    let mut list = Vec::with_capacity(segments.len());
    let all = segments.iter().all(|segment| gather(memory, *segment, &mut list));
    all.then(|| Buffers::new(list))
}

/// Writes the status and hands the chain back.
fn answer(turn: &mut Turn<'_>, reply: &Reply, status: Status) -> Result<(), Violation> {
    // The byte was checked with its chain.
    let _ = turn.memory.write_obj(status.byte(), reply.status);
    // What counts is how much is surely written from the front on. The status is behind the rest.
    let answer_bytes = if status == Status::Ok { reply.answer_bytes } else { 0 };
    let written = answer_bytes + u64::from(answer_bytes == reply.room_bytes);
    let written = u32::try_from(written).unwrap_or(u32::MAX);
    turn.queues[reply.queue].complete(turn.memory, reply.head, written)
}

impl VirtioDevice for Blk {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            number: 2,
            name: "virtio-blk",
            class: ClassCode(0x01, 0x80, 0x00),
            section: kind::VIRTIO_BLK,
            section_version: 1,
        }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES[..self.queues]
    }

    fn features(&self) -> u64 {
        let common = 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_MQ;
        let rest = if self.volume.is_read_only() {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        common | rest
    }

    /// `virtio_blk_config`; what belongs to features that are not offered is zero.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let block_bytes = self.volume.block_bytes();
        let mut out = Encoder::new();
        out.u64(self.volume.sectors());
        // size_max; then seg_max, geometry, blk_size.
        out.u32(0);
        out.u32(SEGMENTS_MAX);
        out.u32(0);
        out.u32(block_bytes);
        // Topology, writeback and a byte unused.
        out.u64(0);
        out.u16(0);
        out.u16(self.queues as u16);
        if !self.volume.is_read_only() {
            out.u32(DISCARD_SECTORS_MAX);
            out.u32(RANGES_MAX as u32);
            out.u32(block_bytes / SECTOR_BYTES as u32);
            out.u32(ZERO_SECTORS_MAX);
            out.u32(RANGES_MAX as u32);
            out.bool(self.volume.zeroes_may_unmap());
        }
        let config = out.into_bytes();
        for (at, byte) in (offset as usize..).zip(data.iter_mut()) {
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
    }

    fn reset(&mut self) {
        assert_eq!(self.backend.in_flight(), 0, "the kernel still has requests of this driver");
        self.left_alone = 0;
        self.throttle.forget_waiting();
        self.features = 0;
    }

    fn run(&mut self, turn: &mut Turn<'_>, event: Event) -> Result<Progress, Violation> {
        let mut progress = Progress::Done;
        match event {
            Event::Queue(index) => progress = self.take(turn, index)?,
            Event::Source => {
                self.finish(Some(&mut *turn))?;
                // What the kernel did by part goes on.
                self.submit(turn.now);
            }
            Event::Timer => {
                self.submit(turn.now);
                self.take_due(turn)?;
            }
        }
        self.take_again(turn)?;
        if self.has_room_again() || event == Event::Source && self.backend.has_errand() {
            progress = Progress::More;
        }
        Ok(progress)
    }

    fn errand(&mut self) -> Option<Errand> {
        let errand = self.backend.errand()?;
        // Whatever becomes of the device meanwhile: what its jobs point into stays.
        let memory = self.memory.clone();
        Some(Box::new(move || {
            errand();
            drop(memory);
        }))
    }

    fn source(&self) -> Option<RawFd> {
        Some(self.backend.fd())
    }

    fn wants_source(&self) -> bool {
        true
    }

    fn deadline(&self) -> Option<Instant> {
        [self.retry, self.throttle.deadline()].into_iter().flatten().min()
    }

    fn settle(
        &mut self,
        turn: Option<&mut Turn<'_>>,
        deadline: Instant,
    ) -> Result<usize, Violation> {
        if turn.is_none() {
            self.left_alone = 0;
            self.throttle.forget_waiting();
        }
        self.drain(turn, deadline)
    }

    /// Requests under way are no part of it: a paused device has none.
    fn save(&self, out: &mut Encoder) {
        out.u64(self.volume.sectors());
        out.bool(self.volume.is_read_only());
    }

    fn restore(
        &mut self,
        _version: u32,
        fields: &mut Decoder<'_>,
        features: Option<u64>,
    ) -> Result<(), StateError> {
        let (sectors, read_only) = (fields.u64("blk sectors")?, fields.bool("blk read_only")?);
        let mine = (self.volume.sectors(), self.volume.is_read_only());
        if sectors != mine.0 {
            return Err(StateError::value("blk sectors", sectors, mine.0.to_string()));
        }
        if read_only != mine.1 {
            return Err(StateError::value("blk read_only", read_only, mine.1.to_string()));
        }
        self.features = features.unwrap_or(0);
        Ok(())
    }
}
