//! The format against a disk that loses what was not synced, and against every kind of damage.

use std::cell::{Cell, RefCell};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::machine::migratable::MachineState;
use crate::memory::{self, GuestMemory, PAGE_BYTES};
use crate::migration::{DiskShape, FeatureWord};
use crate::state::kind;

const PAGES: u64 = 640;
const SECTOR_BYTES: usize = 512;

/// A disk with a cache. What was written since the last sync is lost at a power cut, or not,
/// sector by sector.
struct Disk {
    /// As it reads.
    now: RefCell<Vec<u8>>,
    durable: RefCell<Vec<u8>>,
    /// Writes and syncs that still work.
    left: Cell<u64>,
    done: Cell<u64>,
}

impl Disk {
    fn new(bytes: Vec<u8>) -> Self {
        let (now, durable) = (RefCell::new(bytes.clone()), RefCell::new(bytes));
        Self { now, durable, left: Cell::new(u64::MAX), done: Cell::new(0) }
    }

    fn step(&self) -> io::Result<()> {
        let left = self.left.get().checked_sub(1).ok_or(io::ErrorKind::Other)?;
        self.left.set(left);
        self.done.set(self.done.get() + 1);
        Ok(())
    }

    /// What is there after the power was cut.
    fn cut(&self, mut seed: u64) -> Self {
        let (now, mut left) = (self.now.borrow(), self.durable.borrow().clone());
        let sectors = left.chunks_mut(SECTOR_BYTES).zip(now.chunks(SECTOR_BYTES));
        for (left, now) in sectors.filter(|(left, now)| left != now) {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            if seed >> 63 == 1 {
                left.copy_from_slice(now);
            }
        }
        Self::new(left)
    }
}

impl Target for Disk {
    fn bytes(&self) -> u64 {
        self.now.borrow().len() as u64
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let (start, now) = (offset as usize, self.now.borrow());
        buffer.copy_from_slice(&now[start..start + buffer.len()]);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.step()?;
        let start = offset as usize;
        self.now.borrow_mut()[start..start + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.step()?;
        self.durable.borrow_mut().clone_from(&self.now.borrow());
        Ok(())
    }
}

fn shape() -> Shape {
    Shape {
        uid: "the-domain".into(),
        vcpus: 2,
        memory_bytes: PAGES * PAGE_BYTES,
        interfaces: vec![[2; 6]],
        disks: vec![DiskShape { serial: "root".into(), bytes: 4096, ..Default::default() }],
        cpu_features: vec![FeatureWord { leaf: 7, subleaf: 0, register: 1, bits: 3 }],
    }
}

/// Memory with pages alone and in rows, long rows, zeros that were written, and holes.
fn guest(seed: u64) -> GuestMemory {
    let memory = memory::create(PAGES * PAGE_BYTES).unwrap();
    for page in 0..PAGES {
        if page > 300 || page % 7 < 3 {
            let value = if page % 11 == 0 { 0 } else { page ^ seed << 20 };
            memory.write_obj(value, GuestAddress(page * PAGE_BYTES + page % 512 * 8)).unwrap();
        }
    }
    memory
}

fn contents(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; (PAGES * PAGE_BYTES) as usize];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

fn machine_state(seed: u64) -> MachineState {
    let vcpu = state::section(kind::VCPU, 0, 1, |out| (0..300).for_each(|n| out.u64(n ^ seed)));
    MachineState { sections: vec![state::section(kind::VM, 0, 1, |out| out.u64(seed)), vcpu] }
}

fn write_to(disk: &Disk, seed: u64) -> Result<(), SaveError> {
    let header = Header {
        stage: Stage::Writing,
        id: [seed as u8; 16],
        uid: shape().uid,
        memory_bytes: shape().memory_bytes,
        record_bytes: 0,
        pages: 0,
    };
    write::begin(disk, &header)?;
    let image = state::encode(&machine_state(seed)).unwrap();
    let content = Content { shape: &shape(), image: &image, memory: &guest(seed) };
    let whole = write::write(disk, &header, &content, &|| Ok(()))?;
    write::commit(disk, &whole)
}

/// What can be restored: memory and state; `None` when it was used up.
fn read_from(disk: &Disk) -> Result<Option<(Vec<u8>, MachineState)>, RestoreError> {
    let Some(header) = read::open(disk, &shape().uid)? else { return Ok(None) };
    let memory = memory::create(PAGES * PAGE_BYTES).unwrap();
    let state = read::read(disk, &header, &shape(), &memory, &|| Ok(()))?;
    Ok(Some((contents(&memory), state)))
}

fn written(seed: u64) -> (Vec<u8>, MachineState) {
    (contents(&guest(seed)), machine_state(seed))
}

const DISK_BYTES: usize = (PAGES * PAGE_BYTES) as usize + (64 << 10);

/// A disk with a whole state; what lies behind it is not zero.
fn whole() -> Vec<u8> {
    let disk = Disk::new(vec![0xee; DISK_BYTES]);
    write_to(&disk, 1).unwrap();
    disk.durable.into_inner()
}

/// Where each record begins, and where the last one ends.
fn records(disk: &[u8]) -> Vec<usize> {
    let header = Header::decode(disk).unwrap();
    let start = format::RECORDS_START as usize;
    let (mut at, end) = (start, start + header.record_bytes as usize);
    let mut places = vec![at];
    while at < end {
        let length = u32::from_le_bytes(disk[at + 4..at + 8].try_into().unwrap());
        at += format::RECORD_HEADER_BYTES + length as usize + format::CRC_BYTES;
        places.push(at);
    }
    assert_eq!(at, end);
    places
}

#[test]
fn what_is_written_is_read_once() {
    let disk = Disk::new(whole());
    assert!(records(&disk.now.borrow()).len() > 4);
    assert!(read_from(&disk).unwrap() == Some(written(1)));
    let header = read::open(&disk, "the-domain").unwrap().unwrap();
    write::use_up(&disk, &header).unwrap();
    for seed in 0..8 {
        assert!(read_from(&disk.cut(seed)).unwrap().is_none(), "used up, also after a power cut");
    }
    // The place can be used again.
    write_to(&disk, 2).unwrap();
    assert!(read_from(&disk).unwrap() == Some(written(2)));
}

/// Whenever the power is cut or the disk fails, there is the state from before, or the new one,
/// or none; never a part, and never one of parts of both.
#[test]
fn a_part_is_never_taken_for_a_whole_one() {
    let steps = {
        let disk = Disk::new(whole());
        write_to(&disk, 2).unwrap();
        disk.done.get()
    };
    assert!(steps >= 7, "{steps}");
    let mut seen = [0, 0, 0];
    for left in 0..=steps {
        for seed in 0..12 {
            let disk = Disk::new(whole());
            disk.left.set(left);
            assert_eq!(write_to(&disk, 2).is_ok(), left == steps);
            let after = disk.cut(seed * steps + left);
            match read_from(&after) {
                Ok(found) if found == Some(written(1)) => {
                    assert!(left <= 1, "the old one after {left} of {steps} steps");
                    seen[0] += 1;
                }
                Ok(found) => {
                    assert!(found == Some(written(2)));
                    // All but the last sync, at least.
                    assert!(left >= steps - 1, "the new one after {left} of {steps} steps");
                    seen[1] += 1;
                }
                Err(RestoreError::Unfinished) => seen[2] += 1,
                Err(error) => panic!("after {left} of {steps} steps: {error}"),
            }
        }
    }
    assert!(seen.iter().all(|times| *times > 0), "{seen:?}");
}

/// The last step fails and the one that takes it back works: nothing whole is left.
#[test]
fn a_state_that_cannot_be_made_whole_is_taken_back() {
    struct Fails<'a>(&'a Disk, Cell<bool>);
    impl Target for Fails<'_> {
        fn bytes(&self) -> u64 {
            self.0.bytes()
        }
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
            self.0.read_at(buffer, offset)
        }
        fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
            self.0.write_at(bytes, offset)
        }
        fn sync(&self) -> io::Result<()> {
            if self.1.replace(false) { Err(io::ErrorKind::Other.into()) } else { self.0.sync() }
        }
    }
    let disk = Disk::new(whole());
    let header = read::open(&disk, "the-domain").unwrap().unwrap();
    let fails = Fails(&disk, Cell::new(true));
    assert!(matches!(write::commit(&fails, &header), Err(SaveError::Write { .. })));
    assert!(matches!(read_from(&disk.cut(0)), Err(RestoreError::Unfinished)));
}

/// Too small by any number of sectors: an error that says what suffices.
#[test]
fn a_small_target_is_refused() {
    let needed = *records(&whole()).last().unwrap();
    for bytes in [0, 512, 4096, 4608, 1 << 20, needed / 512 * 512, needed - 1] {
        let disk = Disk::new(vec![0; bytes]);
        let error = write_to(&disk, 1).unwrap_err();
        let text =
            format!("path: has {bytes} bytes, too few; accepted: 69730304, which always suffice");
        assert_eq!(error.to_string(), text);
        assert!(read_from(&disk).is_err());
    }
    write_to(&Disk::new(vec![0; needed]), 1).unwrap();
}

/// Memory that is nowhere zero, and one where every second page is, take less than is asked for.
#[test]
fn the_room_that_is_asked_for_suffices() {
    for step in [1, 2] {
        let memory = guest(0);
        for page in (0..PAGES).step_by(step) {
            memory.write_obj(!page, GuestAddress(page * PAGE_BYTES)).unwrap();
        }
        let disk = Disk::new(vec![0; DISK_BYTES]);
        let mut header = read::open(&Disk::new(whole()), "the-domain").unwrap().unwrap();
        header.stage = Stage::Writing;
        let content = Content { shape: &shape(), image: &[], memory: &memory };
        let whole = write::write(&disk, &header, &content, &|| Ok(())).unwrap();
        // 32 bytes a MiB, a row each where they are alone; shape and ends beside.
        let rest = whole.record_bytes - whole.pages * PAGE_BYTES;
        assert!(rest < 1024 + whole.pages * 16, "{rest} bytes for {} pages", whole.pages);
        assert!(rest < 1024 + PAGES * PAGE_BYTES - (whole.pages - 1) * PAGE_BYTES);
    }
}

#[test]
fn every_cut_is_noticed() {
    let disk = whole();
    let places = records(&disk);
    for place in &places {
        for cut in [place - 1, *place, place + 1, place + 8, place + 9] {
            if cut >= *places.last().unwrap() {
                continue;
            }
            // The rest of the file is gone, or is what was there before.
            let error = read_from(&Disk::new(disk[..cut].to_vec())).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("damaged") || text.contains("no saved state"), "{cut}: {text}");
            let mut zeros = disk.clone();
            zeros[cut..].fill(0);
            let error = read_from(&Disk::new(zeros)).unwrap_err().to_string();
            assert!(error.contains("damaged"), "{cut}: {error}");
        }
    }
}

/// Records of an earlier saving in the same place, or in another order, are none of this one.
#[test]
fn records_belong_to_their_saving_and_place() {
    let (mut disk, other) = (whole(), Disk::new(vec![0; DISK_BYTES]));
    write_to(&other, 2).unwrap();
    let places = records(&disk);
    let last = places.len() - 2;
    let other = other.now.into_inner();
    assert_eq!(records(&other), places);
    disk[places[last]..places[last + 1]].copy_from_slice(&other[places[last]..places[last + 1]]);
    let error = read_from(&Disk::new(disk)).unwrap_err().to_string();
    assert!(error.contains("has the wrong checksum"), "{error}");
}

/// Each thing that does not fit has its name.
#[test]
fn what_does_not_fit_is_named() {
    let disk = Disk::new(whole());
    let header = read::open(&disk, "the-domain").unwrap().unwrap();
    let refused = |change: &dyn Fn(&mut Shape)| {
        let mut mine = shape();
        change(&mut mine);
        let memory = memory::create(mine.memory_bytes).unwrap();
        read::read(&disk, &header, &mine, &memory, &|| Ok(())).unwrap_err().to_string()
    };
    let begin = "the saved state does not fit this machine: ";
    for (change, text) in [
        (&(|s: &mut Shape| s.memory_bytes *= 2) as &dyn Fn(&mut Shape), "memory_bytes: 2621440; "),
        (&|s| s.vcpus = 1, "vcpus: 2; accepted: 1"),
        (&|s| s.interfaces.clear(), "interfaces: "),
        (&|s| s.disks.clear(), "disks: 1; accepted: 0"),
        (&|s| s.disks[0].bytes = 8192, "disks[0].bytes: 4096; accepted: 8192"),
        (&|s| s.cpu_features.clear(), "cpu: CPUID 0x7.0 ebx lacks bits 0x00000003"),
    ] {
        let error = refused(change);
        assert!(error.starts_with(&format!("{begin}{text}")), "{error}");
    }
    let foreign = read::open(&disk, "another").unwrap_err().to_string();
    let text = "the saved state is of another domain: uid: the-domain; accepted: another";
    assert_eq!(foreign, text);
    for bytes in [vec![0; DISK_BYTES], vec![0; 512]] {
        let error = read_from(&Disk::new(bytes)).unwrap_err().to_string();
        assert_eq!(error, "it holds no saved state");
    }
    let mut newer = whole();
    newer[8] = 2;
    let error = read_from(&Disk::new(newer)).unwrap_err().to_string();
    assert_eq!(error, "the saved state has version 2; accepted: 1");
}

/// The end of the VMM and the last step of a saving: one of them comes first.
#[test]
fn a_saving_is_cancelled_or_closed() {
    let control = SaveControl::new();
    assert!(control.close() && !control.cancel() && !control.is_cancelled());
    let control = SaveControl::new();
    assert!(control.cancel() && control.cancel() && !control.close() && control.is_cancelled());
}

proptest! {
    #[test]
    fn every_damaged_byte_is_noticed(at in any::<prop::sample::Index>(), flip in 1u8..) {
        let mut disk = whole();
        let end = *records(&disk).last().unwrap();
        let at = at.index(end);
        disk[at] ^= flip;
        // Between the header's sector and the first record lies nothing.
        let nothing = (512..4096).contains(&at);
        prop_assert_eq!(read_from(&Disk::new(disk)).is_ok(), nothing);
    }

    /// Also the header's own bytes, each of which is checked alone above only now and then.
    #[test]
    fn no_header_panics(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = Header::decode(&bytes);
        let mut disk = whole();
        let start = format::RECORDS_START as usize;
        disk[start..start + bytes.len()].copy_from_slice(&bytes);
        prop_assert!(bytes.is_empty() || read_from(&Disk::new(disk)).is_err());
    }
}
