//! Each kind of request, done and refused; chains that are cut, broken, too long.

use super::*;

#[test]
fn every_kind_of_request_does_what_it_says() {
    for which in backends() {
        let mut bench = Bench::new(which);
        let before = contents(SECTORS);
        assert_eq!(bench.read(0, 1), before[..512], "{which:?}");
        assert_eq!(bench.read(60, 4), before[60 * 512..]);

        let data: Vec<u8> = (0..1024u32).map(|at| (at * 3) as u8).collect();
        let write = Ask { kind: OUT, sector: 5, output: &data, room: 0 };
        assert_eq!(bench.ask(write), (OK, 1));
        assert_eq!(bench.read(5, 2), data);
        assert_eq!(bench.ask(Ask { kind: FLUSH_KIND, ..Ask::default() }), (OK, 1));
        assert_eq!(bench.on_disk()[5 * 512..7 * 512], data);

        let zeroes = [range(0, 2, 0), range(8, 1, 1), range(9, 0, 0)].concat();
        let ask = Ask { kind: WRITE_ZEROES, output: &zeroes, ..Ask::default() };
        assert_eq!(bench.ask(ask), (OK, 1));
        assert_eq!(bench.read(0, 2), [0; 1024]);
        assert_eq!(bench.read(8, 1), [0; 512]);
        assert_eq!(bench.read(9, 1), before[9 * 512..10 * 512]);

        let discard = range(32, 16, 0);
        let ask = Ask { kind: DISCARD, output: &discard, ..Ask::default() };
        assert_eq!(bench.ask(ask).0, OK);
        assert_eq!(bench.on_disk()[32 * 512..48 * 512], [0; 16 * 512]);
        assert_eq!(bench.on_disk().len(), SECTORS * 512, "the file keeps its length");

        let id = Ask { kind: GET_ID, room: 20, ..Ask::default() };
        assert_eq!(bench.ask(id), (OK, 21));
        assert_eq!(bench.room(0, 20), b"root-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(bench.ask(Ask { room: 3, ..id }), (OK, 4));
        assert_eq!(bench.room(0, 3), b"roo");
        assert_eq!(bench.ask(Ask { room: 64, ..id }), (OK, 20));
        wait_until("an interrupt", || bench.driver.interrupts(0) > 0);
    }
}

#[test]
fn the_configuration_says_what_the_volume_is() {
    let bench = Bench::new(Which::Threads);
    let config = bench.config();
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!((word(0), word(4)), (SECTORS as u32, 0));
    assert_eq!((word(12), word(20)), (254, 512), "seg_max, blk_size");
    assert_eq!(config[34..36], [QUEUES as u8, 0]);
    assert_eq!((word(36), word(40), word(44)), (DISCARD_SECTORS_MAX, 16, 1));
    assert_eq!((word(48), word(52), config[56]), (ZERO_SECTORS_MAX, 16, 1));
    let offered = 1 << 2 | 1 << 6 | FLUSH | 1 << 12 | 1 << 13 | 1 << 14;
    assert_eq!(bench.driver.offered() & 0xff_ffff, offered);

    for (vcpus, queues) in [(1, 1), (3, 3), (8, 4)] {
        let (file, memory) = (file(1), memory::create(MEMORY_BYTES).unwrap());
        let volume = Volume::open(file.path(), false).unwrap();
        let blk = Blk::new(volume, "", vcpus, memory).unwrap();
        assert_eq!(crate::virtio::VirtioDevice::queue_sizes(&blk).len(), queues);
    }
}

/// Header, data and status may be cut into descriptors anywhere.
#[test]
fn chains_may_be_cut_anywhere() {
    for which in backends() {
        let mut bench = Bench::new(which);
        let data: Vec<u8> = (0..512u32).map(|at| (at * 5) as u8).collect();
        bench.put(0, 0, Ask { kind: OUT, sector: 3, output: &data, room: 0 });
        let driver = &mut bench.driver;
        // Header in three parts, the last of which runs on into the data.
        let mut header = [0; 16];
        driver.memory.read_slice(&mut header, GuestAddress(BUFFERS)).unwrap();
        driver.memory.write_slice(&header[9..], GuestAddress(BUFFERS + OUTPUT - 7)).unwrap();
        driver.descriptor(0, 0, (BUFFERS, 4, NEXT, 1));
        driver.descriptor(0, 1, (BUFFERS + 4, 5, NEXT, 2));
        driver.descriptor(0, 2, (BUFFERS + OUTPUT - 7, 7 + 100, NEXT, 3));
        driver.descriptor(0, 3, (BUFFERS + OUTPUT + 100, 412, NEXT, 4));
        driver.descriptor(0, 4, (BUFFERS + STATUS, 1, WRITE, 0));
        driver.kick(0);
        driver.wait_used(0);
        assert_eq!(bench.status(0), OK);
        assert_eq!(bench.on_disk()[3 * 512..4 * 512], data);

        // The status behind the data, in one buffer.
        bench.put(0, 0, Ask { kind: IN, sector: 3, ..Ask::default() });
        bench.driver.descriptor(0, 1, (BUFFERS + ROOM, 513, WRITE, 0));
        bench.driver.kick(0);
        assert_eq!(bench.driver.wait_used(0), (0, 513));
        let room = bench.room(0, 513);
        assert_eq!((&room[..512], room[512]), (&data[..], OK));
    }
}

/// What has no place for an answer stops the device; a reset brings it back.
#[test]
fn chains_that_cannot_be_answered_stop_the_device() {
    let mut bench = Bench::new(Which::Threads);
    type Crime = fn(&mut TestDriver);
    let crimes: [Crime; 5] = [
        // No byte for the status.
        |d| d.descriptor(0, 0, (BUFFERS, 16, 0, 0)),
        // Half a header.
        |d| {
            d.descriptor(0, 0, (BUFFERS, 8, NEXT, 1));
            d.descriptor(0, 1, (BUFFERS + 64, 1, WRITE, 0));
        },
        // To be read behind what is to be written.
        |d| {
            d.descriptor(0, 0, (BUFFERS, 16, NEXT, 1));
            d.descriptor(0, 1, (BUFFERS + 64, 1, WRITE | NEXT, 2));
            d.descriptor(0, 2, (BUFFERS + 128, 512, 0, 0));
        },
        // A loop.
        |d| {
            d.descriptor(0, 0, (BUFFERS, 16, NEXT, 1));
            d.descriptor(0, 1, (BUFFERS + 64, 8, WRITE | NEXT, 0));
        },
        // A buffer that is longer than memory.
        |d| {
            d.descriptor(0, 0, (BUFFERS, 16, NEXT, 1));
            d.descriptor(0, 1, (BUFFERS, u32::MAX, WRITE, 0));
        },
    ];
    for (number, crime) in crimes.into_iter().enumerate() {
        assert_eq!(bench.driver.start(ALL), 15);
        crime(&mut bench.driver);
        bench.driver.offer(0, 0);
        bench.driver.kick(0);
        wait_until(&format!("crime {number} is noticed"), || bench.needs_reset());
        assert_eq!(bench.driver.used(0), None);
    }
    assert_eq!(bench.driver.start(ALL), 15);
    assert_eq!(bench.read(1, 1), contents(2)[512..]);
    assert_eq!(bench.on_disk(), contents(SECTORS));
}

#[test]
fn what_cannot_be_done_is_answered_and_not_done() {
    for which in backends() {
        let mut bench = Bench::new(which);
        let sectors = SECTORS as u64;
        let data = [9; 1024];
        let read = |sector, room| Ask { kind: IN, sector, room, ..Ask::default() };
        let write = |sector, output| Ask { kind: OUT, sector, output, room: 0 };
        let cases = [
            (IOERR, read(sectors, 512)),
            (IOERR, read(sectors - 1, 1024)),
            (IOERR, read(u64::MAX, 512)),
            (IOERR, read(1 << 55, 512)),
            (IOERR, read(0, 511)),
            (IOERR, Ask { output: &data, ..read(0, 512) }),
            (IOERR, write(sectors - 1, &data)),
            (IOERR, write(0, &data[..100])),
            (IOERR, Ask { room: 512, ..write(0, &data) }),
            (IOERR, Ask { kind: GET_ID, ..Ask::default() }),
            (UNSUPP, Ask { kind: 2, ..Ask::default() }),
            (UNSUPP, Ask { kind: 0xffff_ffff, output: &data, room: 512, ..Ask::default() }),
        ];
        for (status, ask) in cases {
            let written = u32::from(ask.room == 0);
            assert_eq!(bench.ask(ask), (status, written), "{which:?} {ask:?}");
        }
        let ranges = [
            (DISCARD, IOERR, range(sectors, 1, 0)),
            (DISCARD, IOERR, range(u64::MAX, 2, 0)),
            (DISCARD, IOERR, range(0, u32::MAX, 0)),
            (DISCARD, UNSUPP, range(0, 1, 1)),
            (DISCARD, IOERR, range(0, 1, 0)[..15].to_vec()),
            (DISCARD, IOERR, Vec::new()),
            (DISCARD, IOERR, range(0, 1, 0).repeat(17)),
            (DISCARD, IOERR, [range(0, 1, 0), range(sectors, 1, 0)].concat()),
            (WRITE_ZEROES, UNSUPP, range(0, 1, 2)),
            (WRITE_ZEROES, IOERR, range(1, SECTORS as u32, 0)),
        ];
        for (kind, status, output) in ranges {
            let ask = Ask { kind, output: &output, ..Ask::default() };
            assert_eq!(bench.ask(ask), (status, 1), "{which:?} {ask:?}");
        }
        // Nothing to move, at the very end: fine.
        assert_eq!(bench.ask(read(sectors, 0)), (OK, 1));
        assert_eq!(bench.on_disk(), contents(SECTORS));
        assert!(!bench.needs_reset());
    }
}

/// A driver that did not take a feature does not get it, and one request has its limit.
#[test]
fn limits_hold_on_a_large_volume() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(4 << 30).unwrap();
    let mut bench = Bench::with(file, false, |volume| make(Which::Threads, volume));
    for (kind, sectors, expected) in [
        (DISCARD, DISCARD_SECTORS_MAX, OK),
        (DISCARD, DISCARD_SECTORS_MAX + 1, IOERR),
        (WRITE_ZEROES, ZERO_SECTORS_MAX + 1, IOERR),
    ] {
        let output = range(0, sectors, 0);
        let ask = Ask { kind, output: &output, ..Ask::default() };
        assert_eq!(bench.ask(ask).0, expected, "{ask:?}");
    }
    // The same buffer again and again.
    let part = 1 << 20;
    let parts = (REQUEST_BYTES_MAX / part) as u16;
    bench.put(0, 0, Ask { kind: IN, ..Ask::default() });
    for index in 1..=parts + 1 {
        let buffer = (BUFFERS + 0x10_0000, part as u32, WRITE | NEXT, index + 1);
        bench.driver.descriptor(0, index, buffer);
    }
    bench.driver.descriptor(0, parts + 2, (BUFFERS + STATUS, 1, WRITE, 0));
    bench.driver.kick(0);
    assert_eq!(bench.driver.wait_used(0), (0, 0));
    assert_eq!(bench.status(0), IOERR);

    assert_eq!(bench.driver.start(VERSION_1), 15);
    for kind in [DISCARD, WRITE_ZEROES] {
        let output = range(0, 1, 0);
        let ask = Ask { kind, output: &output, ..Ask::default() };
        assert_eq!(bench.ask(ask), (UNSUPP, 1));
    }
}

#[test]
fn a_read_only_disk_is_read_only() {
    for which in backends() {
        let mut bench = Bench::with(file(SECTORS), true, |volume| make(which, volume));
        let offered = bench.driver.offered();
        assert_ne!(offered & 1 << VIRTIO_BLK_F_RO, 0);
        assert_eq!(offered & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES), 0);
        let data = [1; 512];
        let ask = Ask { kind: OUT, sector: 0, output: &data, room: 0 };
        assert_eq!(bench.ask(ask), (IOERR, 1));
        let zero = range(0, 1, 0);
        let ask = Ask { kind: WRITE_ZEROES, output: &zero, ..Ask::default() };
        assert_eq!(bench.ask(ask), (UNSUPP, 1));
        assert_eq!(bench.ask(Ask { kind: FLUSH_KIND, ..Ask::default() }), (OK, 1));
        assert_eq!(bench.read(0, SECTORS as u32), contents(SECTORS));
    }
}

/// A flush is answered when the volume has done it, and not by what else is under way.
#[test]
fn a_flush_is_answered_by_the_volume_alone() {
    let (mut bench, gate) = gated();
    let data = [1; 512];
    bench.put(0, 0, Ask { kind: OUT, sector: 0, output: &data, room: 0 });
    bench.put(0, 1, Ask { kind: FLUSH_KIND, ..Ask::default() });
    bench.driver.kick(0);
    wait_until("both are under way", || gate.submitted() == 2);
    assert!(gate.is(0, |work| matches!(work, Work::Write { durable: false, .. })));
    assert!(gate.is(1, |work| matches!(work, Work::Flush)));
    gate.release(0, Ok(()));
    assert_eq!(bench.driver.wait_used(0).0, 0);
    assert_eq!((bench.driver.used(0), bench.status(1)), (None, 0xff), "not flushed yet");
    gate.release(0, Ok(()));
    assert_eq!((bench.driver.wait_used(0).0, bench.status(1)), (4, OK));

    // A flush that fails says so.
    bench.put(0, 1, Ask { kind: FLUSH_KIND, ..Ask::default() });
    bench.driver.kick(0);
    wait_until("it is under way", || gate.submitted() == 1 && gate.held() == 1);
    gate.release(0, Err(std::io::Error::from_raw_os_error(libc::EIO)));
    assert_eq!((bench.driver.wait_used(0), bench.status(1)), ((4, 1), IOERR));
}

/// A driver that does not know FLUSH gets writes that are durable when they are completed.
#[test]
fn without_flush_writes_are_durable_at_once() {
    let (mut bench, gate) = gated();
    let discard_only = VERSION_1 | 1 << VIRTIO_BLK_F_DISCARD;
    assert_eq!(bench.driver.start(discard_only), 15);
    let data = [1; 512];
    let discard = range(0, 1, 0);
    bench.put(0, 0, Ask { kind: OUT, sector: 0, output: &data, room: 0 });
    bench.put(0, 1, Ask { kind: DISCARD, output: &discard, ..Ask::default() });
    bench.driver.kick(0);
    wait_until("both are under way", || gate.held() == 2);
    assert!(gate.is(0, |work| matches!(work, Work::Write { durable: true, .. })));
    assert!(gate.is(1, |work| matches!(work, Work::Discard { durable: true, .. })));
    gate.release_all();

    for which in backends() {
        let mut bench = Bench::new(which);
        assert_eq!(bench.driver.start(discard_only), 15);
        bench.put(0, 0, Ask { kind: OUT, sector: 0, output: &data, room: 0 });
        bench.put(0, 1, Ask { kind: DISCARD, sector: 0, output: &range(1, 1, 0), room: 0 });
        bench.driver.kick(0);
        bench.driver.wait_used(0);
        bench.driver.wait_used(0);
        assert_eq!((bench.status(0), bench.status(1)), (OK, OK));
        assert_eq!(bench.on_disk()[..1024], [[1; 512], [0; 512]].concat());
    }
}
