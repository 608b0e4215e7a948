//! What is done at once, within a turn or by the worker itself.

use std::time::Instant;

use super::backend::{Buffers, Reply, wait_readable};
use super::*;

const DEADLINE: Duration = Duration::from_secs(10);
const KIB: u32 = 1 << 10;

/// A chain with one large buffer, which every chain shares.
fn put_large(bench: &mut Bench, queue: usize, bytes: u32) {
    bench.put(queue, 0, Ask { kind: IN, ..Ask::default() });
    let buffer = (BUFFERS + 0x8_0000, bytes, WRITE | NEXT, 2);
    bench.driver.descriptor(queue, 1, buffer);
    bench.driver.descriptor(queue, 2, (BUFFERS + STATUS, 1, WRITE, 0));
}

/// A volume of sparse zeros on a backend that does nothing by itself.
fn gated_large(sectors: u64) -> (Bench, Gate) {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(sectors * 512).unwrap();
    let gate = Gate::new();
    let backend = gate.clone();
    (Bench::with(file, false, |_| Box::new(backend)), gate)
}

/// What is done when it is submitted is told in the same turn: no event is needed.
#[test]
fn what_is_done_at_once_is_told_at_once() {
    let (mut bench, gate) = gated();
    gate.state.lock().unwrap().is_open = true;
    // All are there when the device looks.
    bench.driver.device.pause().unwrap();
    for slot in 0..3 {
        bench.put(0, slot, Ask { kind: IN, room: 512, ..Ask::default() });
    }
    bench.driver.device.resume();
    for slot in 0..3 {
        assert_eq!(bench.driver.wait_used(0), (slot * 4, 513));
    }
    assert_eq!(gate.state.lock().unwrap().done_max, 3);
}

/// Large requests are told one by one, so that the driver works on while the rest is copied.
#[test]
fn large_requests_do_not_wait_for_each_other() {
    let (mut bench, gate) = gated_large(1 << 11);
    gate.state.lock().unwrap().is_open = true;
    put_large(&mut bench, 0, 512 * KIB);
    for _ in 1..8 {
        bench.driver.offer(0, 0);
    }
    bench.driver.kick(0);
    for _ in 0..8 {
        assert_eq!(bench.driver.wait_used(0), (0, 512 * KIB + 1));
    }
    assert_eq!(gate.state.lock().unwrap().done_max, 1);
}

/// A queue that was left alone has its turn also when room was made on the way of another's.
#[test]
fn room_that_is_made_on_the_way_is_used() {
    let (mut bench, gate) = gated_large(1 << 15);
    // Each buffer 1 MiB, again and again.
    let part = 1 << 20;
    let parts = 16u16;
    for queue in 0..2 {
        bench.put(queue, 0, Ask { kind: IN, ..Ask::default() });
        for index in 1..=parts {
            let buffer = (BUFFERS + 0x8_0000, part, WRITE | NEXT, index + 1);
            bench.driver.descriptor(queue, index, buffer);
        }
        bench.driver.descriptor(queue, parts + 1, (BUFFERS + STATUS, 1, WRITE, 0));
    }
    let bound = (UNDER_WAY_BYTES_MAX / (u64::from(part) * u64::from(parts))) as usize;
    for _ in 1..=bound {
        bench.driver.offer(0, 0);
    }
    bench.driver.kick(0);
    wait_until("as many as may be are under way", || gate.submitted() == bound);
    for _ in 0..bound {
        gate.release_untold(0, Ok(()));
    }
    bench.driver.kick(1);
    let mut answered = [0, 0];
    wait_until("all are answered", || {
        if gate.held() > 0 {
            gate.release(0, Ok(()));
        }
        for (queue, answered) in answered.iter_mut().enumerate() {
            *answered += usize::from(bench.driver.used(queue).is_some());
        }
        answered == [bound + 1, 1]
    });
}

fn read_job(room: &mut [u8], offset: u64) -> Job {
    let buffer = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() };
    let reply = Reply {
        queue: 0,
        head: 0,
        status: GuestAddress(0),
        room_bytes: room.len() as u64,
        answer_bytes: room.len() as u64,
        moved_bytes: room.len() as u64,
        changes: Vec::new(),
        written: Vec::new(),
    };
    Job { work: Work::Read { offset, buffers: Buffers::new(vec![buffer]) }, reply }
}

/// As who pauses the device does it.
fn drain(backend: &mut Uring) -> usize {
    let deadline = Instant::now() + DEADLINE;
    let mut done = Vec::new();
    while backend.in_flight() > 0 {
        assert!(Instant::now() < deadline, "{} are still under way", backend.in_flight());
        backend.submit();
        backend.finished(&mut done);
        if backend.in_flight() > 0 {
            wait_readable(backend.fd(), DEADLINE);
        }
    }
    assert!(done.iter().all(|done| done.result.is_ok()));
    done.len()
}

/// Who pauses the device holds its lock: the worker cannot come for what it was to do. That goes
/// through the ring, and the end of what it is doing is told.
#[test]
fn a_pause_waits_for_the_worker_and_not_for_what_it_has_not_begun() {
    let file = file(SECTORS);
    let volume = open(&file, false);
    let Ok(backend) = Uring::new(&volume, 8) else { return };
    let mut backend = backend.with_reads_at_once();
    let bytes = SECTORS * 512;
    let mut rooms = [vec![0; bytes], vec![0; bytes]];
    let mut errands = Vec::new();
    for room in &mut rooms {
        // SAFETY: the rooms live until both have come back.
        unsafe { backend.start(read_job(room, 0)) };
        errands.extend((errands.is_empty()).then(|| backend.errand()).flatten());
    }
    assert!(backend.has_errand());
    assert_eq!((errands.len(), backend.in_flight()), (1, 2));
    backend.recall();
    assert!(!backend.has_errand() && backend.errand().is_none());
    let mut done = Vec::new();
    wait_until("the ring has done the second", || {
        backend.submit();
        backend.finished(&mut done);
        done.len() == 1
    });
    assert_eq!(backend.in_flight(), 1);
    let worker = std::thread::spawn(move || errands.into_iter().for_each(|errand| errand()));
    assert_eq!(drain(&mut backend), 1);
    worker.join().unwrap();
    assert!(rooms.iter().all(|room| *room == contents(SECTORS)));

    // And the next errand is an errand again.
    // SAFETY: as above.
    unsafe { backend.start(read_job(&mut rooms[0], 0)) };
    backend.errand().unwrap()();
    let mut done = Vec::new();
    backend.finished(&mut done);
    assert_eq!((done.len(), backend.in_flight()), (1, 0));
}

/// What lies in the cache is known to, and what does not is left to the ring.
#[test]
fn only_what_is_cached_is_for_the_worker() {
    let file = file(SECTORS);
    let volume = open(&file, false);
    let bytes = SECTORS as u64 * 512;
    assert!(volume.is_cached(0, bytes) && volume.is_cached(4095, 2));
    assert!(!volume.is_cached(0, bytes + 4096), "there is no page behind the end");
    assert!(!volume.is_cached(0, 0));
    let sparse = NamedTempFile::new().unwrap();
    sparse.as_file().set_len(bytes).unwrap();
    let volume = open(&sparse, false);
    assert!(!volume.is_cached(0, 4096), "nobody has read it");
}
