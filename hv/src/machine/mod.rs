//! The machine: KVM's VM, its vCPUs and devices, and what may be done with them.
//!
//! A [`Machine`] is made from a [`DomainConfig`] and stands still. Then either [`Machine::boot`]
//! loads its kernel, or a migration fills its memory and restores its state; [`resume`] lets it
//! run, on the vCPUs' own threads ([`vcpu`]). What the guest does by ports and addresses goes to
//! [`Devices`]; how its run ends is told to the `OnExit` that the machine was made with, once by
//! each vCPU that finds out. A guest that reboots gets a new machine.
//!
//! Whoever has the machine owns it; the vCPUs share only its devices. Migration drives it through
//! [`migratable::MigratableVm`].
//!
//! [`resume`]: migratable::MigratableVm::resume

mod cpuid;
mod devices;
mod disks;
mod error;
pub mod exit;
pub mod generation;
mod landing;
pub mod migratable;
pub mod ports;
pub mod power;
pub mod vcpu;
mod vcpu_state;
mod vm_state;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_cpuid_entry2, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use uuid::Uuid;
use vmm_sys_util::eventfd::EventFd;

use crate::config::{DiskLimits, DomainConfig, FieldError};
use crate::console::Console;
use crate::guest_agent::GuestAgent;
use crate::memory::{self, DirtyPages, DirtyTracker, GuestMemory, KvmDirtyLog};
use crate::migration::{Shape, cpu_features};
use crate::pci::{self, HotPlug, KvmWiring, PciBus, Wiring};
use crate::serial::SerialPort;
use crate::state::{self, kind};
use crate::virtio::blk::{Blk, VolumeError};
use crate::virtio::console::{Port, VirtioConsole};
use crate::virtio::net::{MacAddress, Net, NetCounters, Tap};
use crate::virtio::rng::Rng;
use crate::virtio::{VirtioDevice, VirtioPci};
use crate::{acpi, loader};
pub use devices::Devices;
use devices::SciLine;
pub use disks::Purpose;
pub use error::MachineError;
use error::kvm;
use generation::Generation;
use migratable::{MachineState, MigratableDisk, MigratableError, MigratableVm, StateSection};
use power::Power;
use vcpu::{Bus, OnExit, Vcpu};
use vcpu_state::{VcpuStateError, VcpuStates};
use vm_state::{Clock, mismatch, step};

/// Three pages that KVM on Intel needs for real mode, between the PCI windows and 4 GiB.
const TSS_START: usize = 0xfffb_d000;

/// A machine. Dropping it ends its threads.
pub struct Machine {
    // The order matters when it is dropped: first those who run the guest, last its memory.
    vcpus: Vec<Vcpu>,
    devices: Arc<Devices>,
    virtio: Vec<Arc<VirtioPci>>,
    /// Those of them that are the configuration's disks, in its order.
    disks: Vec<Arc<VirtioPci>>,
    guest_agent: Option<Arc<GuestAgent>>,
    generation: Option<Generation>,
    dirty: DirtyTracker,
    vm: Arc<VmFd>,
    wiring: Arc<dyn Wiring>,
    memory: GuestMemory,
    config: DomainConfig,
    /// CPUID of the first vCPU, as the guest was shown it.
    cpuid: Vec<kvm_cpuid_entry2>,
    counters: Vec<Arc<NetCounters>>,
    /// The same, as a migration sees them.
    volumes: Vec<MigratableDisk>,
    /// The guest has ended its run.
    ended: Arc<AtomicBool>,
    paused: bool,
    /// To be set when the guest resumes, after a restore.
    clock: Option<Clock>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("paused", &self.paused).finish_non_exhaustive()
    }
}

impl Machine {
    /// Makes a machine that stands still, with empty memory. `on_eject` is called when the guest
    /// has let go of a disk.
    ///
    /// # Errors
    /// When KVM, memory, a tap or a disk is not to be had; nothing is left behind.
    pub fn new(
        config: &DomainConfig,
        purpose: Purpose,
        console: Arc<Console>,
        on_exit: OnExit,
        on_eject: Box<dyn Fn() + Send + Sync>,
    ) -> Result<Self, MachineError> {
        let ended = Arc::new(AtomicBool::new(false));
        let on_exit: OnExit = {
            let ended = Arc::clone(&ended);
            Arc::new(move |exit| {
                ended.store(true, Ordering::SeqCst);
                on_exit(exit);
            })
        };
        let system = kvm("opening /dev/kvm", Kvm::new())?;
        let vm = Arc::new(kvm("creating a VM", system.create_vm())?);
        kvm("placing the task state segment", vm.set_tss_address(TSS_START))?;
        kvm("creating the interrupt controllers", vm.create_irq_chip())?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        kvm("creating the interval timer", vm.create_pit2(pit))?;
        let memory = memory::create(config.memory_bytes)?;
        let log = KvmDirtyLog::register(Arc::clone(&vm), &memory)?;
        let dirty = DirtyTracker::new(memory.clone(), Box::new(log));

        let serial =
            SerialPort::new(console, interrupt(&vm, "the serial port", ports::SERIAL_LINE)?);
        let power = Power::new(Box::new(SciLine(Arc::clone(&vm))));
        let wiring: Arc<dyn Wiring> = Arc::new(KvmWiring::new(Arc::clone(&vm)));
        let hot_plug =
            HotPlug::new(interrupt(&vm, "the hot-plug registers", ports::HOT_PLUG_LINE)?, on_eject);
        let pci = PciBus::new(Arc::clone(&wiring), hot_plug);
        let mut virtio = Vec::new();
        let mut counters = Vec::new();
        let mut add = |device: Box<dyn VirtioDevice>, slot: Option<u8>, name: String| {
            let slot = slot.unwrap_or_else(|| pci.next_slot());
            let made = VirtioPci::new(device, slot, memory.clone(), Arc::clone(&wiring));
            // The machine stands still.
            let function = made
                .and_then(|function| function.pause().map_err(io::Error::other).map(|()| function))
                .map_err(|source| MachineError::Device { device: name, source })?;
            let function = Arc::new(function);
            if purpose == Purpose::Incoming {
                function.expect();
            }
            pci.add(slot, Arc::clone(&function) as _);
            virtio.push(Arc::clone(&function));
            Ok::<_, MachineError>(function)
        };
        for (index, interface) in config.interfaces.iter().enumerate() {
            let mac = interface.mac_address()?;
            let tap = Tap::open(&interface.tap).map_err(|error| {
                let field = format!("interfaces[{index}].tap");
                FieldError::new(field, error, "a tap device that exists and is free")
            })?;
            let net = Net::new(Box::new(tap), MacAddress(mac.bytes()), interface.ip_addresses());
            counters.push(net.counters());
            add(Box::new(net), None, format!("interfaces[{index}]"))?;
        }
        let (mut disks, mut volumes) = (Vec::new(), Vec::new());
        for (index, disk) in config.disks.iter().enumerate() {
            let at = format!("disks[{index}]");
            let (mut blk, volume) = disks::make(&at, disk, purpose, config.vcpus, &memory)?;
            blk.set_limits(disk.limits, Instant::now());
            volumes.push(volume);
            disks.push(add(Box::new(blk), disk.slot, at)?);
        }
        add(Box::new(Rng::new()), None, "the entropy device".into())?;
        let mut guest_agent = None;
        if config.guest_agent {
            let device = || "guest_agent".to_owned();
            let port =
                Port::new().map_err(|source| MachineError::Device { device: device(), source })?;
            add(Box::new(VirtioConsole::new(Arc::clone(&port))), None, device())?;
            guest_agent = Some(Arc::new(GuestAgent::new(port)));
        }
        let generation = match config.generation()? {
            Some(_) => {
                let line = interrupt(&vm, "the generation's device", ports::GENERATION_LINE)?;
                Some(Generation::new(memory.clone(), line))
            }
            None => None,
        };
        let devices = Arc::new(Devices { serial, power, pci });

        let (vcpus, cpuid) = vcpus(&system, &vm, config.vcpus, &devices, &on_exit)?;
        Ok(Self {
            vcpus,
            devices,
            virtio,
            disks,
            guest_agent,
            generation,
            dirty,
            vm,
            wiring,
            memory,
            config: config.clone(),
            cpuid,
            counters,
            volumes,
            ended,
            paused: true,
            clock: None,
        })
    }

    /// Loads the domain's kernel and puts the first vCPU at its entry. The others wait to be
    /// started by it. Memory must be empty: once a machine.
    ///
    /// # Errors
    /// When kernel or initramfs are not what they should be; the machine is of no use then.
    pub fn boot(&mut self) -> Result<(), MachineError> {
        let rsdp = acpi::write(&self.memory, self.config.vcpus, self.generation.is_some())?;
        if let (Some(generation), Some(id)) = (&self.generation, self.config.generation()?) {
            generation.begin(id)?;
        }
        let kernel = loader::load(&self.memory, &self.config, rsdp)?;
        self.vcpus[0].set_entry(kernel).wait()??;
        Ok(())
    }

    /// Stops the devices. When one does not stop, the machine runs on as if nothing had been asked.
    fn pause_devices(&self) -> Result<(), MigratableError> {
        for (index, function) in self.virtio.iter().enumerate() {
            if let Err(error) = function.pause() {
                for paused in &self.virtio[..index] {
                    paused.resume();
                }
                if !self.ended.load(Ordering::SeqCst) {
                    self.vcpus.iter().for_each(Vcpu::run);
                }
                return Err(step("pausing the guest", error));
            }
        }
        Ok(())
    }

    /// Ends the machine, when its devices let go of what they began; otherwise it stays in memory,
    /// as the kernel may still write to the guest's, and the process has to end.
    ///
    /// # Errors
    /// When a disk of the node hangs.
    pub fn end(self) -> Result<(), MigratableError> {
        for function in &self.virtio {
            if let Err(error) = function.pause() {
                std::mem::forget(self);
                return Err(step("ending the machine", error));
            }
        }
        Ok(())
    }

    /// Saves the vCPUs of a running machine, one after the other.
    fn save_vcpus_in_turn(&self) -> Result<Vec<StateSection>, MigratableError> {
        let mut sections = Vec::new();
        for vcpu in &self.vcpus {
            vcpu.park().wait()?;
            let saved = vcpu.save().wait();
            if !self.paused && !self.ended.load(Ordering::SeqCst) {
                vcpu.run();
            }
            sections.push(saved??);
        }
        Ok(sections)
    }

    /// The state of everything that is no vCPU.
    fn save_rest(&self, sections: &mut Vec<StateSection>) -> Result<(), MigratableError> {
        sections.extend(vm_state::save(&self.vm)?);
        sections.push(self.devices.power.save());
        sections.push(self.devices.serial.save());
        sections.extend(self.devices.pci.save());
        Ok(())
    }

    fn restore_devices(&self, state: &MachineState) -> Result<(), MigratableError> {
        self.devices.power.restore(state).map_err(mismatch)?;
        self.devices.serial.restore(state).map_err(mismatch)?;
        self.devices.pci.restore(state)?;
        Ok(())
    }

    fn shape_section(&self) -> StateSection {
        state::section(kind::VM, 0, 1, |out| {
            out.u32(self.config.vcpus);
            out.u64(self.config.memory_bytes);
        })
    }

    /// The devices that may be used while the guest runs.
    pub fn devices(&self) -> &Arc<Devices> {
        &self.devices
    }

    /// What has gone through each network interface.
    pub fn net_counters(&self) -> &[Arc<NetCounters>] {
        &self.counters
    }

    /// The way to the guest's agent, if the domain has one.
    pub fn guest_agent(&self) -> Option<&Arc<GuestAgent>> {
        self.guest_agent.as_ref()
    }

    /// The guest has become another one, a clone or an earlier state of itself: it is told. Answers
    /// false when it has no generation.
    ///
    /// # Errors
    /// Never, as memory reaches beyond 1 MiB.
    pub fn set_generation(&mut self, id: Uuid) -> Result<bool, MachineError> {
        match &self.generation {
            Some(generation) => Ok(generation.change(id).map(|()| true)?),
            None => Ok(false),
        }
    }

    /// Limits a disk from now on; `index` is its place in the configuration.
    pub fn set_disk_limits(&mut self, index: usize, limits: DiskLimits) {
        let done =
            self.disks[index].with(|blk: &mut Blk, _| blk.set_limits(limits, Instant::now()));
        assert!(done.is_some(), "disks are block devices");
    }

    /// A disk's volume has grown: tells the guest. Answers its length before and now, in bytes.
    ///
    /// # Errors
    /// When it has shrunk; then nothing has changed.
    pub fn grow_disk(&mut self, index: usize) -> Result<(u64, u64), VolumeError> {
        let grown = self.disks[index].with(|blk: &mut Blk, interrupt| blk.grow(interrupt));
        grown.unwrap_or_else(|| unreachable!("disks are block devices"))
    }

    /// What must fit for this machine to move, on either side.
    pub fn shape(&self) -> Shape {
        let macs = self.config.interfaces.iter().filter_map(|i| i.mac_address().ok());
        Shape {
            uid: self.config.uid.clone(),
            vcpus: self.config.vcpus,
            memory_bytes: self.config.memory_bytes,
            interfaces: macs.map(|mac| mac.bytes()).collect(),
            disks: self.volumes.iter().map(MigratableDisk::shape).collect(),
            cpu_features: cpu_features(&self.cpuid),
        }
    }

    /// Whether it stands still.
    pub fn is_paused(&self) -> bool {
        self.paused
    }
}

/// An eventfd that raises this device's line, edge by edge.
fn interrupt(vm: &VmFd, device: &'static str, line: u32) -> Result<EventFd, MachineError> {
    let made = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
    let interrupt =
        made.map_err(|source| MachineError::Device { device: device.into(), source })?;
    kvm(device, vm.register_irqfd(&interrupt, line))?;
    Ok(interrupt)
}

/// The vCPUs, parked, and the CPUID of the first.
fn vcpus(
    system: &Kvm,
    vm: &VmFd,
    count: u32,
    devices: &Arc<Devices>,
    on_exit: &OnExit,
) -> Result<(Vec<Vcpu>, Vec<kvm_cpuid_entry2>), MachineError> {
    if !system.check_extension(Cap::ImmediateExit) {
        let source = kvm_ioctls::Error::new(libc::ENOSYS);
        return Err(MachineError::Kvm { step: "looking for KVM_CAP_IMMEDIATE_EXIT", source });
    }
    let supported =
        kvm("reading the supported CPUID", system.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))?;
    let msrs = kvm("listing MSRs", system.get_msr_index_list())?;
    let msrs: Vec<u32> =
        msrs.as_slice().iter().copied().filter(|msr| vcpu_state::is_saved(*msr)).collect();
    let mut vcpus = Vec::new();
    let mut first = Vec::new();
    for index in 0..count {
        let fd = kvm("creating a vCPU", vm.create_vcpu(index.into()))?;
        let cpuid = cpuid::adapt(supported.as_slice(), index, count);
        vcpu_state::set_cpuid(&fd, &cpuid)?;
        vcpu_state::set_up(&fd)?;
        let bus = Arc::clone(devices) as Arc<dyn Bus>;
        if index == 0 {
            first.clone_from(&cpuid);
        }
        let states = VcpuStates { msrs: msrs.clone(), cpuid };
        let vcpu = Vcpu::spawn(index, fd, states, bus, Arc::clone(on_exit))
            .map_err(|source| MachineError::Device { device: format!("vCPU {index}"), source })?;
        vcpus.push(vcpu);
    }
    Ok((vcpus, first))
}

impl From<VcpuStateError> for MigratableError {
    fn from(error: VcpuStateError) -> Self {
        Self::Step { step: error.step, reason: error.reason }
    }
}

impl From<pci::RestoreError> for MigratableError {
    fn from(error: pci::RestoreError) -> Self {
        match error {
            pci::RestoreError::State(error) => mismatch(error),
            error @ pci::RestoreError::Routes(_) => step("restoring PCI", error),
        }
    }
}

impl MigratableVm for Machine {
    fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn disks(&self) -> &[MigratableDisk] {
        &self.volumes
    }

    fn pause(&mut self) -> Result<(), MigratableError> {
        if self.paused {
            return Ok(());
        }
        // All at once, then the devices: what a vCPU has told one is seen before it stops.
        let parking: Vec<_> = self.vcpus.iter().map(Vcpu::park).collect();
        for vcpu in parking {
            vcpu.wait()?;
        }
        self.pause_devices()?;
        self.paused = true;
        if self.ended.load(Ordering::SeqCst) {
            // What it has just told the machine is in no register: elsewhere it would go on.
            return Err(step("pausing the guest", "it has ended its run meanwhile"));
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MigratableError> {
        if !self.paused || self.ended.load(Ordering::SeqCst) {
            return Ok(());
        }
        if let Some(clock) = self.clock.take() {
            clock.set(&self.vm)?;
        }
        let telling: Vec<_> = self.vcpus.iter().map(Vcpu::note_stop).collect();
        for vcpu in telling {
            vcpu.wait()?;
        }
        for function in &self.virtio {
            function.resume();
        }
        self.devices.serial.resume();
        self.devices.pci.hot_plug().resume();
        for vcpu in &self.vcpus {
            vcpu.run();
        }
        self.paused = false;
        Ok(())
    }

    fn save_state(&mut self) -> Result<MachineState, MigratableError> {
        assert!(self.paused, "the state of a running machine is none");
        let began = Instant::now();
        let saving: Vec<_> = self.vcpus.iter().map(Vcpu::save).collect();
        let mut sections = vec![self.shape_section()];
        for vcpu in saving {
            sections.push(vcpu.wait()??);
        }
        let vcpus = began.elapsed();
        self.save_rest(&mut sections)?;
        tracing::debug!(?vcpus, all = ?began.elapsed(), "the state is saved");
        Ok(MachineState { sections })
    }

    fn rehearsal_state(&mut self) -> Result<Option<MachineState>, MigratableError> {
        let mut sections = vec![self.shape_section()];
        sections.extend(self.save_vcpus_in_turn()?);
        self.save_rest(&mut sections)?;
        Ok(Some(MachineState { sections }))
    }

    fn restore_state(&mut self, state: MachineState) -> Result<(), MigratableError> {
        assert!(self.paused, "a running machine cannot take over a state");
        let mut fields = state::fields(state::find(&state, kind::VM, 0).map_err(mismatch)?, 1)
            .map_err(mismatch)?;
        let vcpus = fields.u32("vcpus").map_err(mismatch)?;
        let memory_bytes = fields.u64("memory_bytes").map_err(mismatch)?;
        fields.finish("vm").map_err(mismatch)?;
        if (vcpus, memory_bytes) != (self.config.vcpus, self.config.memory_bytes) {
            return Err(mismatch(format!(
                "{vcpus} vCPUs with {memory_bytes} bytes; accepted: {} with {}",
                self.config.vcpus, self.config.memory_bytes
            )));
        }
        let mut restoring = Vec::new();
        for (vcpu, index) in self.vcpus.iter().zip(0..) {
            let section = state::find(&state, kind::VCPU, index).map_err(mismatch)?;
            if index == 0 {
                self.cpuid = vcpu_state::cpuid_of(section).map_err(mismatch)?;
            }
            restoring.push(vcpu.restore(section.clone()));
        }
        // Meanwhile what does not need the vCPUs: KVM takes its time over interrupt routes.
        let began = Instant::now();
        let restored = self.restore_devices(&state);
        let devices = began.elapsed();
        for vcpu in restoring {
            vcpu.wait()??;
        }
        restored?;
        let vcpus = began.elapsed();
        self.clock = Some(vm_state::restore(&self.vm, &state)?);
        let all = began.elapsed();
        tracing::debug!(?devices, ?vcpus, ?all, "the state is restored");
        Ok(())
    }

    fn was_saved(&mut self) {
        self.clock = self.clock.take().map(Clock::after_saving);
    }

    fn start_dirty_log(&mut self) -> Result<(), MigratableError> {
        Ok(self.dirty.start()?)
    }

    fn take_dirty(&mut self) -> Result<DirtyPages, MigratableError> {
        Ok(self.dirty.take()?)
    }

    fn take_last_dirty(&mut self) -> Result<DirtyPages, MigratableError> {
        Ok(self.dirty.take_last()?)
    }

    fn put_back_dirty(&mut self, pages: &DirtyPages) {
        self.dirty.put_back(pages);
    }

    fn stop_dirty_log(&mut self) -> Result<(), MigratableError> {
        Ok(self.dirty.stop()?)
    }

    fn attract(&mut self) {
        assert!(self.paused, "a running machine has its frames");
        for function in &self.virtio {
            function.attract();
        }
    }

    fn catch_up(&mut self) {
        landing::first_for_a_moment(self.vcpus.iter().filter_map(Vcpu::tid).collect());
    }

    fn announce(&mut self) {
        for function in &self.virtio {
            function.announce();
        }
    }
}
