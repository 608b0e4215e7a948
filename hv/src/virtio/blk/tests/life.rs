//! The device beside its requests: pausing, resetting, dropping, saving, limits.

use super::*;

/// The kernel writes past `vm-memory`; live migration must see it all the same.
#[test]
fn pages_that_were_read_into_are_dirty() {
    for which in backends() {
        let mut bench = Bench::new(which);
        let memory = bench.driver.memory.clone();
        let region = memory.iter().next().unwrap();
        bench.put(0, 0, Ask { kind: IN, sector: 0, room: 9 * 512, ..Ask::default() });
        std::ops::Deref::deref(region).bitmap().reset();
        bench.driver.kick(0);
        bench.driver.wait_used(0);
        let dirty =
            |at: u64| std::ops::Deref::deref(region).bitmap().dirty_at((BUFFERS + at) as usize);
        assert!(dirty(STATUS), "{which:?}");
        assert_eq!([dirty(OUTPUT), dirty(ROOM - 1)], [false, false]);
        assert_eq!([0, 0x1000, 0x2000].map(|at| dirty(ROOM + at)), [true, true, false]);
    }
}

/// Pausing waits for what is under way; afterwards it is in the rings, and nothing moves.
#[test]
fn a_pause_waits_for_what_is_under_way() {
    let (mut bench, gate) = gated();
    for slot in 0..3 {
        bench.put(0, slot, Ask { kind: IN, room: 512, ..Ask::default() });
    }
    bench.driver.kick(0);
    wait_until("all are under way", || gate.submitted() == 3);
    let done = Mutex::new(false);
    let mut calls = gate.calls();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            bench.driver.device.pause().unwrap();
            *done.lock().unwrap() = true;
        });
        for _ in 0..3 {
            wait_until("somebody waits for them", || gate.calls() > calls);
            assert!(!*done.lock().unwrap(), "paused with requests under way");
            calls = gate.calls();
            gate.release(0, Ok(()));
        }
    });
    assert_eq!(gate.held(), 0);
    for slot in 0..3 {
        assert_eq!(bench.driver.used(0), Some((slot * 4, 513)));
    }
    bench.put(0, 0, Ask { kind: IN, room: 512, ..Ask::default() });
    bench.driver.kick(0);
    assert_eq!((gate.held(), bench.driver.used(0)), (0, None));
    bench.driver.device.resume();
    wait_until("it goes on", || gate.held() == 1);
    gate.release_all();
    bench.driver.wait_used(0);
}

/// A disk of the node that hangs does not hang the pause: it fails, and the device goes on.
#[test]
fn a_pause_does_not_wait_for_ever() {
    let (mut bench, gate) = gated();
    bench.put(0, 0, Ask { kind: IN, room: 512, ..Ask::default() });
    bench.driver.kick(0);
    wait_until("it is under way", || gate.submitted() == 1);
    let error = bench.driver.device.pause_within(Duration::from_millis(20)).unwrap_err();
    assert_eq!(error.to_string(), "virtio-blk: 1 requests are still under way after 20ms");
    gate.release_all();
    assert_eq!(bench.driver.wait_used(0), (0, 513));
    bench.driver.device.pause().unwrap();
}

/// A reset is done when nothing is under way: afterwards the guest may use its memory for something
/// else. Until then it reads a status that is not 0, and no vCPU stands still for a disk that hangs.
#[test]
fn a_reset_is_done_when_nothing_is_under_way_and_tells_nobody() {
    let (mut bench, gate) = gated();
    for slot in 0..2 {
        bench.put(0, slot, Ask { kind: IN, room: 512, ..Ask::default() });
    }
    bench.driver.kick(0);
    wait_until("they are under way", || gate.submitted() == 2);
    bench.driver.write(0x14, &[0]);
    for _ in 0..2 {
        assert_ne!(bench.driver.status(), 0);
        // What an impatient driver writes changes nothing.
        bench.driver.write(0x14, &[1]);
        bench.driver.write(0x14, &[0]);
        let calls = gate.calls();
        gate.release(0, Ok(()));
        wait_until("somebody looks", || gate.calls() > calls);
    }
    wait_until("the reset is done", || bench.driver.status() == 0);
    assert_eq!((bench.driver.used(0), bench.status(0), bench.status(1)), (None, 0xff, 0xff));
    assert_eq!(bench.driver.start(ALL), 15);
    bench.put(0, 0, Ask { kind: IN, room: 512, ..Ask::default() });
    bench.driver.kick(0);
    wait_until("it is under way", || gate.held() == 1);
    gate.release_all();
    assert_eq!(bench.driver.wait_used(0), (0, 513));
}

/// A machine may be paused, and moved, in the middle of a reset.
#[test]
fn a_pause_ends_a_reset() {
    let (mut bench, gate) = gated();
    bench.put(0, 0, Ask { kind: IN, room: 512, ..Ask::default() });
    bench.driver.kick(0);
    wait_until("it is under way", || gate.submitted() == 1);
    bench.driver.write(0x14, &[0]);
    let error = bench.driver.device.pause_within(Duration::from_millis(20)).unwrap_err();
    assert_eq!(error.under_way, 1);
    assert_ne!(bench.driver.status(), 0);
    gate.release_all();
    bench.driver.device.pause().unwrap();
    assert_eq!(bench.driver.status(), 0);
    bench.driver.device.resume();
    assert_eq!(bench.driver.start(ALL), 15);
}

/// The same chain again and again fills the queue and no more.
#[test]
fn no_more_is_under_way_than_the_queue_holds() {
    let (mut bench, gate) = gated();
    bench.put(0, 0, Ask { kind: FLUSH_KIND, ..Ask::default() });
    for _ in 1..256 {
        bench.driver.offer(0, 0);
    }
    bench.driver.kick(0);
    wait_until("the queue is full", || gate.held() == 256);
    bench.driver.offer(0, 0);
    bench.driver.kick(0);
    wait_until("the guest is found out", || bench.needs_reset());
    assert_eq!(gate.held(), 256);
    gate.release_all();
    assert_eq!(bench.driver.start(ALL), 15);
}

/// When the system has no room for requests, they are tried again without a kick.
#[test]
fn what_the_system_had_no_room_for_is_tried_again() {
    let (mut bench, gate) = gated();
    gate.state.lock().unwrap().refusals = 3;
    bench.put(0, 0, Ask { kind: FLUSH_KIND, ..Ask::default() });
    bench.driver.kick(0);
    wait_until("it was submitted", || gate.submitted() == 1);
    assert_eq!(gate.state.lock().unwrap().refusals, 0);
    gate.release_all();
    assert_eq!(bench.driver.wait_used(0), (0, 1));
}

#[test]
fn state_travels_between_volumes_of_one_size() {
    for which in backends() {
        let mut bench = Bench::new(which);
        bench.read(0, 1);
        bench.driver.device.pause().unwrap();
        bench.put(1, 2, Ask { kind: IN, sector: 7, room: 512, ..Ask::default() });
        let state = bench.driver.state();

        let memory = bench.driver.memory.clone();
        let new = |sectors, read_only| {
            let make = |volume: &Arc<Volume>| make(which, volume);
            Bench::unstarted(file(sectors), read_only, make, Some(memory.clone()))
        };
        let mut moved = new(SECTORS, false);
        moved.driver.device.pause().unwrap();
        moved.driver.device.restore(1, &state).unwrap();
        assert_eq!(moved.driver.state(), state);
        moved.driver.seen = bench.driver.seen.clone();
        moved.driver.device.resume();
        assert_eq!(moved.driver.wait_used(1), (8, 513));
        assert_eq!(moved.room(2, 512), contents(8)[7 * 512..]);

        let error = new(SECTORS + 1, false).driver.device.restore(1, &state).unwrap_err();
        assert_eq!(error.to_string(), "state: blk sectors is 64; accepted: 65");
        assert!(new(SECTORS, true).driver.device.restore(1, &state).is_err());
    }
}

/// A device that is dropped in the middle leaves nothing behind that writes into memory.
#[test]
fn a_device_may_be_dropped_with_requests_under_way() {
    for which in backends() {
        let mut bench = Bench::new(which);
        for slot in 0..8 {
            bench.put(0, slot, Ask { kind: IN, room: 0x1_0000 / 4, ..Ask::default() });
        }
        bench.driver.kick(0);
        let Bench { driver, file } = bench;
        drop(driver);
        Volume::open(file.path(), false).unwrap();
    }
}

/// A full queue is answered to the last request, on a ring that holds less than the queue.
#[test]
fn a_full_queue_is_answered() {
    for which in backends() {
        let mut bench = Bench::new(which);
        bench.put(0, 0, Ask { kind: IN, room: 4096, ..Ask::default() });
        for _ in 1..256 {
            bench.driver.offer(0, 0);
        }
        bench.driver.kick(0);
        for _ in 0..256 {
            assert_eq!(bench.driver.wait_used(0), (0, 4097), "{which:?}");
        }
        assert_eq!(bench.room(0, 4096), contents(8));
    }
}

/// A guest cannot make a pause wait for all that its queues could ask for: the bytes under way
/// have a bound, and what waits behind it has its turn.
#[test]
fn the_bytes_under_way_have_a_bound() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(REQUEST_BYTES_MAX).unwrap();
    let gate = Gate::new();
    let backend = gate.clone();
    let mut bench = Bench::with(file, false, |_| Box::new(backend));
    // The same buffer again and again, and the same chain.
    let part = 1 << 20;
    let parts = (REQUEST_BYTES_MAX / part) as u16;
    for queue in 0..2 {
        bench.put(queue, 0, Ask { kind: IN, ..Ask::default() });
        for index in 1..=parts {
            let buffer = (BUFFERS + 0x8_0000, part as u32, WRITE | NEXT, index + 1);
            bench.driver.descriptor(queue, index, buffer);
        }
        bench.driver.descriptor(queue, parts + 1, (BUFFERS + STATUS, 1, WRITE, 0));
        for _ in 1..10 {
            bench.driver.offer(queue, 0);
        }
        bench.driver.kick(queue);
    }
    let bound = (UNDER_WAY_BYTES_MAX / REQUEST_BYTES_MAX) as usize;
    for done in 0..20 {
        // As many as may be, each time, before one is let go.
        let most = bound.min(20 - done);
        wait_until("as many as may be are under way", || gate.held() >= most);
        gate.release(0, Ok(()));
    }
    for queue in 0..2 {
        for _ in 0..10 {
            bench.driver.wait_used(queue);
        }
    }
    assert!(gate.state.lock().unwrap().held_max <= bound);
}

/// The volume grows under the guest: it is told, sees the new size, and can use it at once. A
/// volume that has shrunk changes nothing.
#[test]
fn a_disk_grows_while_the_guest_runs() {
    for which in backends() {
        let mut bench = Bench::new(which);
        let capacity = |bench: &Bench| u64::from_le_bytes(bench.config()[..8].try_into().unwrap());
        let generation = |bench: &Bench| {
            let mut byte = [0];
            bench.driver.device.read_window(0x15, &mut byte);
            byte[0]
        };
        let grow =
            |bench: &Bench| bench.driver.device.with(|blk: &mut Blk, i| blk.grow(i)).unwrap();
        let ask = Ask { kind: IN, sector: 64, room: 512, ..Ask::default() };
        assert_eq!(bench.ask(ask), (IOERR, 0));
        let before = generation(&bench);
        let _ = bench.driver.wiring.raised(0);
        assert_eq!(grow(&bench).unwrap(), (64 * 512, 64 * 512));
        assert_eq!((generation(&bench), bench.driver.wiring.raised(0)), (before, 0));

        bench.file.as_file().set_len(100 * 512).unwrap();
        assert_eq!(grow(&bench).unwrap(), (64 * 512, 100 * 512));
        assert_eq!((capacity(&bench), bench.driver.wiring.raised(0)), (100, 1));
        assert_ne!(generation(&bench), before);
        assert_eq!(bench.read(64, 36), [0; 36 * 512]);
        assert_eq!(bench.ask(Ask { sector: 100, ..ask }), (IOERR, 0));

        for (bytes, said) in
            [(99 * 512, "has 50688 bytes, and had 51200"), (101 * 512 + 1, "has 51713 bytes")]
        {
            bench.file.as_file().set_len(bytes).unwrap();
            let error = grow(&bench).unwrap_err().to_string();
            assert_eq!(error, format!("{}: {said}", bench.file.path().display()));
            assert_eq!(capacity(&bench), 100);
        }
        // The state says the new length, and wants it at the destination.
        let state = bench.driver.state();
        let memory = bench.driver.memory.clone();
        let make = |volume: &Arc<Volume>| make(which, volume);
        let moved = Bench::unstarted(file(100), false, make, Some(memory));
        moved.driver.device.restore(1, &state).unwrap();
    }
}

/// A migration sees a write twice: when it begins, and when it is done, well or not; it may have
/// read the block in between.
#[test]
fn what_is_written_is_tracked_from_before_until_after() {
    let gate = Gate::new();
    let mut volume = None;
    let mut bench = Bench::with(file(SECTORS), false, |its| {
        volume = Some(Arc::clone(its));
        Box::new(gate.clone())
    });
    let volume = volume.unwrap();
    let blocks = || volume.tracker().take(volume.bytes()).next_run(0);
    volume.tracker().start(volume.bytes());
    let zeroes = [0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0];
    bench.put(0, 0, Ask { kind: OUT, output: &[1; 512], ..Ask::default() });
    bench.driver.kick(0);
    wait_until("it is under way", || gate.held() == 1);
    let first = Some((0, tracker::BLOCK_BYTES));
    assert_eq!([blocks(), blocks()], [first, None]);
    gate.release(0, Err(std::io::Error::from_raw_os_error(libc::EIO)));
    bench.driver.wait_used(0);
    assert_eq!([blocks(), blocks()], [first, None], "it may have been written by part");
    for (slot, kind, output) in [(1, DISCARD, &zeroes[..]), (2, WRITE_ZEROES, &zeroes[..])] {
        bench.put(0, slot, Ask { kind, output, ..Ask::default() });
        bench.driver.kick(0);
        wait_until("it is under way", || gate.held() == 1);
        assert_eq!(blocks(), first);
        gate.release_all();
        bench.driver.wait_used(0);
        assert_eq!(blocks(), first);
    }
    bench.put(0, 3, Ask { kind: IN, room: 512, ..Ask::default() });
    bench.driver.kick(0);
    wait_until("it is under way", || gate.held() == 1);
    gate.release_all();
    bench.driver.wait_used(0);
    assert_eq!(blocks(), None);
}
