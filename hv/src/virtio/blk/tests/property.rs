//! A disk against a model of it, and against a guest that keeps to no rule.

use proptest::prelude::*;

use super::*;

/// What a test asks for within its own part of the volume.
#[derive(Debug, Clone)]
struct Step {
    kind: u32,
    sector: u64,
    sectors: u32,
    byte: u8,
}

/// Sectors of each slot, so that what is under way together does not overlap.
const PART: u64 = 10;
const SLOTS: usize = 6;

fn steps() -> impl Strategy<Value = Vec<Vec<Step>>> {
    let kind = prop::sample::select(vec![IN, OUT, FLUSH_KIND, DISCARD, WRITE_ZEROES, GET_ID, 99]);
    let step = (kind, 0..PART, 0u32..6, any::<u8>())
        .prop_map(|(kind, sector, sectors, byte)| Step { kind, sector, sectors, byte });
    prop::collection::vec(prop::collection::vec(step, 1..=SLOTS), 1..12)
}

/// The status that the model expects, after doing the same to `model`.
fn expected(model: &mut [u8], step: &Step, sector: u64) -> u8 {
    let (start, end) = (sector as usize * 512, (sector as usize + step.sectors as usize) * 512);
    match step.kind {
        IN | OUT | DISCARD | WRITE_ZEROES if end > model.len() => return IOERR,
        OUT => model[start..end].fill(step.byte),
        DISCARD | WRITE_ZEROES => model[start..end].fill(0),
        99 => return UNSUPP,
        _ => {}
    }
    OK
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    /// A disk is what a vector of bytes would be, whatever runs together on its queues.
    #[test]
    fn a_disk_is_like_a_model(batches in steps()) {
        for which in backends() {
            let mut bench = Bench::new(which);
            let mut model = contents(SECTORS);
            for batch in &batches {
                let mut statuses = Vec::new();
                for (slot, step) in (0u16..).zip(batch) {
                    // The last slot reaches over the end of the volume.
                    let part = u64::from(slot) * PART + 5;
                    let sector = part + step.sector.min(PART - u64::from(step.sectors));
                    let output = match step.kind {
                        OUT => vec![step.byte; step.sectors as usize * 512],
                        DISCARD => range(sector, step.sectors, 0),
                        WRITE_ZEROES => range(sector, step.sectors, u32::from(step.byte & 1)),
                        _ => Vec::new(),
                    };
                    let room = match step.kind {
                        IN => step.sectors * 512,
                        GET_ID => 20,
                        _ => 0,
                    };
                    let before = model.clone();
                    statuses.push((expected(&mut model, step, sector), before, sector));
                    let ask = Ask { kind: step.kind, sector, output: &output, room };
                    bench.put(usize::from(slot) % QUEUES, slot, ask);
                }
                bench.driver.kick(0);
                bench.driver.kick(1);
                for slot in 0..batch.len() {
                    bench.driver.wait_used(slot % QUEUES);
                }
                for (slot, step) in (0u16..).zip(batch) {
                    let (status, before, sector) = &statuses[usize::from(slot)];
                    prop_assert_eq!(bench.status(slot), *status, "{:?} {:?}", which, step);
                    if step.kind == IN && *status == OK {
                        let (start, length) = (*sector as usize * 512, step.sectors as usize * 512);
                        prop_assert_eq!(&bench.room(slot, length), &before[start..start + length]);
                    }
                }
            }
            prop_assert!(bench.on_disk() == model, "{:?}: the file differs", which);
        }
    }

    /// Whatever the guest puts into the queues: no panic, no spinning, nothing outside of the
    /// volume, and a reset makes the device work again.
    #[test]
    fn a_hostile_guest_harms_only_its_own_device(
        descriptors in prop::collection::vec(
            (0u64..0x60_0000, 0u32..0x2_0000, 0u16..8, 0u16..12), QUEUES * 12),
        headers in prop::collection::vec((0u32..15, 0u64..80, any::<bool>()), 12),
        heads in prop::collection::vec(0u16..14, QUEUES * 8),
    ) {
        for which in backends() {
            let mut bench = Bench::new(which);
            for (i, (address, length, flags, next)) in descriptors.iter().copied().enumerate() {
                let (kind, sector, aimed) = headers[i % 12];
                // Some look like requests as far as their header goes.
                let aim = BUFFERS + (i as u64 % 12) * 0x1000;
                let mut header = u64::from(kind).to_le_bytes().to_vec();
                header.extend(sector.to_le_bytes());
                bench.driver.memory.write_slice(&header, GuestAddress(aim)).unwrap();
                let fields = if aimed { (aim, 16, NEXT, next) } else { (address, length, flags, next) };
                bench.driver.descriptor(i / 12, (i % 12) as u16, fields);
            }
            for (i, head) in heads.iter().copied().enumerate() {
                bench.driver.offer(i / 8, head);
            }
            bench.driver.kick(0);
            bench.driver.kick(1);
            prop_assert_eq!(bench.driver.start(ALL), 15);
            prop_assert_eq!(bench.on_disk().len(), SECTORS * 512);
            let data = [7; 512];
            let write = Ask { kind: OUT, sector: 63, output: &data, room: 0 };
            prop_assert_eq!(bench.ask(write), (OK, 1));
            prop_assert_eq!(bench.read(63, 1), data);
        }
    }
}
