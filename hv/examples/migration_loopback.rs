//! How long a migration's bytes take over loopback, by the number of connections: a machine of
//! plain memory and one disk, both sides in this process, no guest.
//!
//! `migration_loopback DIR MEMORY_MIB DISK_MIB ROUNDS CONNECTIONS…` makes two files in DIR, half
//! of the disk filled, and takes the numbers in turn. Prints time from start to end, the pause, and
//! the processor time of both sides.

#![allow(clippy::unwrap_used)] // a measurement

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use drover_hv::machine::migratable::{MachineState, MigratableDisk, MigratableError, MigratableVm};
use drover_hv::memory::{self, DirtyPages, GuestMemory, PAGE_BYTES};
use drover_hv::migration::{
    DestinationConfig, DestinationControl, DestinationOutcome, Incoming, Limits, Shape,
    SourceConfig, SourceControl, SourceOutcome, remove_handover, source,
};
use drover_hv::state::{self, kind};
use drover_hv::virtio::blk::Volume;
use vm_memory::{Bytes, GuestAddress};

struct Still {
    memory: GuestMemory,
    disks: Vec<MigratableDisk>,
}

impl MigratableVm for Still {
    fn memory(&self) -> &GuestMemory {
        &self.memory
    }
    fn disks(&self) -> &[MigratableDisk] {
        &self.disks
    }
    fn pause(&mut self) -> Result<(), MigratableError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), MigratableError> {
        Ok(())
    }
    fn save_state(&mut self) -> Result<MachineState, MigratableError> {
        Ok(MachineState { sections: vec![state::section(kind::VM, 0, 1, |e| e.u64(0))] })
    }
    fn rehearsal_state(&mut self) -> Result<Option<MachineState>, MigratableError> {
        Ok(None)
    }
    fn restore_state(&mut self, _: MachineState) -> Result<(), MigratableError> {
        Ok(())
    }
    fn start_dirty_log(&mut self) -> Result<(), MigratableError> {
        Ok(())
    }
    fn take_dirty(&mut self) -> Result<DirtyPages, MigratableError> {
        Ok(DirtyPages::none(&self.memory))
    }
    fn take_last_dirty(&mut self) -> Result<DirtyPages, MigratableError> {
        Ok(DirtyPages::none(&self.memory))
    }
    fn put_back_dirty(&mut self, _: &DirtyPages) {}
    fn stop_dirty_log(&mut self) -> Result<(), MigratableError> {
        Ok(())
    }
    fn attract(&mut self) {}
    fn announce(&mut self) {}
}

fn volume(path: &Path, bytes: u64, filled: bool) -> Vec<MigratableDisk> {
    if bytes == 0 {
        return Vec::new();
    }
    let file = std::fs::File::create(path).unwrap();
    file.set_len(bytes).unwrap();
    if filled {
        let block: Vec<u8> = (0..1u32 << 18).flat_map(|n| n.to_le_bytes()).collect();
        for at in (0..bytes / 2).step_by(block.len()) {
            file.write_all_at(&block, at).unwrap();
        }
        file.sync_all().unwrap();
        // Read from the disk, where there is one.
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }
    drop(file);
    let volume = Arc::new(Volume::open(path, false).unwrap());
    vec![MigratableDisk { volume, serial: "root".into(), shared: false, zeroed: false }]
}

fn processor_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it only writes the time, which is borrowed mutably.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn once(dir: &Path, memory_bytes: u64, disk_bytes: u64, connections: u16) {
    let mut here = Still {
        memory: memory::create(memory_bytes).unwrap(),
        disks: volume(&dir.join("here"), disk_bytes, true),
    };
    for page in 0..memory_bytes / PAGE_BYTES {
        let content = (page + 1).to_le_bytes().repeat(PAGE_BYTES as usize / 8);
        here.memory.write_slice(&content, GuestAddress(page * PAGE_BYTES)).unwrap();
    }
    let mut there = Still {
        memory: memory::create(memory_bytes).unwrap(),
        disks: volume(&dir.join("there"), disk_bytes, false),
    };
    let shape = Shape {
        uid: "u".into(),
        vcpus: 1,
        memory_bytes,
        interfaces: vec![],
        disks: here.disks.iter().map(MigratableDisk::shape).collect(),
        cpu_features: vec![],
    };
    let (migration_id, token) = ("m".to_owned(), "t".to_owned());
    let config = SourceConfig {
        migration_id: migration_id.clone(),
        token: token.clone(),
        address: String::new(),
        to_epoch: 1,
        limits: Limits::from_request(None, memory_bytes, disk_bytes).unwrap(),
        connections,
        state_dir: dir.into(),
        shape: shape.clone(),
    };
    let incoming = Incoming::bind("127.0.0.1:0").unwrap();
    let config = SourceConfig { address: incoming.address().to_owned(), ..config };
    let control = DestinationControl::new(1).unwrap();
    let (busy, began) = (processor_seconds(), Instant::now());
    let destination = std::thread::spawn(move || {
        let config = DestinationConfig { migration_id, token, shape, connections };
        incoming.run(&mut there, &config, &control, &mut |_| {})
    });
    let mut pause_us = 0;
    let outcome = source::run(&mut here, &config, &SourceControl::new(), &mut |seen| {
        pause_us = seen.report.as_ref().map_or(0, |report| report.pause_us);
    });
    let took = began.elapsed().as_secs_f64();
    let busy = processor_seconds() - busy;
    assert!(matches!(outcome, SourceOutcome::Succeeded), "{outcome:?}");
    assert!(matches!(destination.join().unwrap(), DestinationOutcome::Running));
    remove_handover(dir).unwrap();
    let mib = (memory_bytes + disk_bytes / 2) as f64 / 1_048_576.0;
    println!(
        "{connections} connections: {took:6.3} s {:7.1} MiB/s, pause {:6.2} ms, processor {busy:6.3} s",
        mib / took,
        pause_us as f64 / 1000.0,
    );
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |n: usize| arguments[n].parse::<u64>().unwrap();
    let dir = Path::new(&arguments[1]);
    for _ in 0..number(4) {
        for connections in &arguments[5..] {
            once(dir, number(2) << 20, number(3) << 20, connections.parse().unwrap());
        }
    }
}
