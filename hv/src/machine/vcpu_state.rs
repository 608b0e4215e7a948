//! A vCPU's registers: at boot, saved, restored.
//!
//! The order of KVM's calls matters, and is the one that other hypervisors found to hold:
//!
//! - saving: the MP state first, because reading it lets KVM take in a pending INIT or SIPI, which
//!   changes the rest; the local APIC before the MSRs, one of which is its timer;
//! - restoring: CPUID before all that depends on it; the special registers (with the APIC's base)
//!   before the local APIC; the APIC before the MSRs; among these the TSC first and the deadline
//!   that is measured with it last; pending events at the end.

use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::migratable::StateSection;
use crate::loader::{LoadedKernel, pvh};
use crate::state::{self, Decoder, Encoder, StateError, kind};

/// Version of the vCPU's section.
const VERSION: u32 = 1;
/// KVM's own limits (`KVM_MAX_CPUID_ENTRIES`, `KVM_MAX_MSR_ENTRIES`).
const ENTRIES_MAX: u32 = 256;
/// Clocks that differ by less than one part in so many are the same; kvmclock and time servers
/// correct the rest. (QEMU has the same limit.)
const TSC_TOLERANCE: u64 = 4000;

const MSR_TSC: u32 = 0x10;
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// A step that KVM refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{step}: {reason}")]
pub struct VcpuStateError {
    /// What was tried.
    pub step: String,
    /// Why it did not work.
    pub reason: String,
}

impl From<StateError> for VcpuStateError {
    fn from(error: StateError) -> Self {
        Self { step: "reading the state of a vCPU".into(), reason: error.to_string() }
    }
}

/// What is needed to save and restore a vCPU, beside its registers.
#[derive(Debug, Clone)]
pub struct VcpuStates {
    /// The MSRs that belong to its state. Those that KVM turns out not to give are removed.
    pub msrs: Vec<u32>,
    /// CPUID as it was set: KVM's copy also mirrors what the guest has switched on.
    pub cpuid: Vec<kvm_cpuid_entry2>,
}

/// Whether an MSR that KVM lists belongs to a guest's state. VMX's (no nested guests) and the
/// performance counters' (the guest has none) do not; KVM refuses to write some of them.
pub(super) fn is_saved(msr: u32) -> bool {
    !matches!(msr,
        0x480..=0x492
        // Intel: counters, event selectors, fixed counters, global control, PEBS, offcore.
        | 0xc1..=0xc8 | 0x186..=0x18d | 0x1a6 | 0x1a7 | 0x309..=0x30c | 0x345 | 0x38d..=0x391
        | 0x3f1 | 0x3f2 | 0x4c1..=0x4c8 | 0x600
        // AMD: legacy, core and version 2 counters.
        | 0xc001_0000..=0xc001_0007 | 0xc001_0200..=0xc001_020b | 0xc000_0300..=0xc000_0303)
}

/// Sets a fresh vCPU's CPUID.
pub(super) fn set_cpuid(fd: &VcpuFd, entries: &[kvm_cpuid_entry2]) -> Result<(), VcpuStateError> {
    let step = "setting CPUID";
    let cpuid = CpuId::from_entries(entries)
        .map_err(|error| VcpuStateError { step: step.into(), reason: format!("{error:?}") })?;
    check(step, fd.set_cpuid2(&cpuid))
}

/// Registers that every fresh vCPU needs beyond what reset gives it.
pub(super) fn set_up(fd: &VcpuFd) -> Result<(), VcpuStateError> {
    /// MTRRs are on, and memory is write-back where they say nothing else.
    const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;
    const FAST_STRINGS: u64 = 1;
    let msrs =
        [entry(MSR_MISC_ENABLE, FAST_STRINGS), entry(MSR_MTRR_DEFAULT_TYPE, MTRR_ON_WRITE_BACK)];
    set_msrs(fd, &msrs)
}

/// The first vCPU's registers at the kernel's PVH entry: 32-bit protected mode, no paging, flat
/// segments, EBX at the start info (Xen's `docs/misc/pvh.pandoc`).
pub(super) fn set_entry(fd: &VcpuFd, kernel: &LoadedKernel) -> Result<(), VcpuStateError> {
    const PROTECTED_MODE: u64 = 1;
    /// The bit that is always set.
    const FLAGS: u64 = 2;
    let mut sregs = check("reading special registers", fd.get_sregs())?;
    let segment = |selector: u16, kind: u8| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(0x8, 0xb);
    let data = segment(0x10, 0x3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr =
        kvm_segment { limit: 0x67, selector: 0x18, type_: 0xb, present: 1, ..Default::default() };
    let limit = (size_of_val(&pvh::GDT) - 1) as u16;
    sregs.gdt = kvm_dtable { base: pvh::GDT_START.0, limit, ..Default::default() };
    sregs.cr0 = PROTECTED_MODE;
    sregs.cr4 = 0;
    sregs.efer = 0;
    check("setting special registers", fd.set_sregs(&sregs))?;
    let regs = kvm_regs {
        rip: kernel.entry.0,
        rbx: kernel.start_info.0,
        rflags: FLAGS,
        ..Default::default()
    };
    check("setting registers", fd.set_regs(&regs))
}

impl VcpuStates {
    /// Saves a vCPU that is out of the guest.
    pub fn save(&mut self, fd: &VcpuFd, index: u32) -> Result<StateSection, VcpuStateError> {
        let mp_state = check("reading the MP state", fd.get_mp_state())?;
        let regs = check("reading registers", fd.get_regs())?;
        let sregs = check("reading special registers", fd.get_sregs())?;
        let xsave = check("reading the extended state", fd.get_xsave())?;
        let xcrs = check("reading extended control registers", fd.get_xcrs())?;
        let debug = check("reading debug registers", fd.get_debug_regs())?;
        let lapic = check("reading the local APIC", fd.get_lapic())?;
        // Refused where the TSC has no fixed rate: zero says so.
        let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
        let msrs = get_msrs(fd, &mut self.msrs)?;
        let events = check("reading pending events", fd.get_vcpu_events())?;

        Ok(state::section(kind::VCPU, index, VERSION, |out| {
            out.u32(self.cpuid.len() as u32);
            for entry in &self.cpuid {
                write(out, entry);
            }
            out.u32(tsc_khz);
            write(out, &mp_state);
            write(out, &regs);
            write(out, &sregs);
            write(out, &xsave);
            write(out, &xcrs);
            write(out, &debug);
            write(out, &lapic);
            out.u32(msrs.len() as u32);
            for msr in &msrs {
                out.u32(msr.index);
                out.u64(msr.data);
            }
            write(out, &events);
        }))
    }

    /// Restores a vCPU that has never run.
    pub fn restore(
        &mut self,
        fd: &VcpuFd,
        index: u32,
        section: &StateSection,
    ) -> Result<(), VcpuStateError> {
        let mut fields = state::fields(section, VERSION)?;
        let cpuid = read_cpuid(&mut fields)?;
        let tsc_khz = fields.u32("vcpu tsc rate")?;
        let mp_state: kvm_mp_state = read(&mut fields, "vcpu mp state")?;
        let regs: kvm_regs = read(&mut fields, "vcpu registers")?;
        let sregs: kvm_sregs = read(&mut fields, "vcpu special registers")?;
        let xsave: kvm_xsave = read(&mut fields, "vcpu extended state")?;
        let xcrs: kvm_xcrs = read(&mut fields, "vcpu extended control registers")?;
        let debug: kvm_debugregs = read(&mut fields, "vcpu debug registers")?;
        let lapic: kvm_lapic_state = read(&mut fields, "vcpu local apic")?;
        let count = bounded(fields.u32("vcpu msrs")?, "vcpu msrs")?;
        let msrs: Vec<kvm_msr_entry> = (0..count)
            .map(|_| Ok(entry(fields.u32("vcpu msr")?, fields.u64("vcpu msr value")?)))
            .collect::<Result<_, StateError>>()?;
        let events: kvm_vcpu_events = read(&mut fields, "vcpu events")?;
        fields.finish("vcpu")?;

        if !same(&cpuid, &self.cpuid) {
            set_cpuid(fd, &cpuid)?;
            self.cpuid = cpuid;
        }
        set_tsc_rate(fd, index, tsc_khz);
        check("setting the MP state", fd.set_mp_state(mp_state))?;
        check("setting registers", fd.set_regs(&regs))?;
        check("setting special registers", fd.set_sregs(&sregs))?;
        // SAFETY: KVM reads KVM_CAP_XSAVE2's size, which exceeds this structure only for features
        // that a process must ask for (AMX), and this one does not.
        check("setting the extended state", unsafe { fd.set_xsave(&xsave) })?;
        check("setting extended control registers", fd.set_xcrs(&xcrs))?;
        check("setting debug registers", fd.set_debug_regs(&debug))?;
        check("setting the local APIC", fd.set_lapic(&lapic))?;
        set_msrs(fd, &in_order(msrs))?;
        check("setting pending events", fd.set_vcpu_events(&events))
    }
}

/// CPUID in a vCPU's section.
///
/// # Errors
/// When it is malformed.
pub(super) fn cpuid_of(section: &StateSection) -> Result<Vec<kvm_cpuid_entry2>, StateError> {
    read_cpuid(&mut state::fields(section, VERSION)?)
}

fn read_cpuid(fields: &mut Decoder<'_>) -> Result<Vec<kvm_cpuid_entry2>, StateError> {
    let count = bounded(fields.u32("vcpu cpuid entries")?, "vcpu cpuid entries")?;
    (0..count).map(|_| read(fields, "vcpu cpuid")).collect()
}

/// The TSC first, its deadline last, the others as they are.
fn in_order(mut msrs: Vec<kvm_msr_entry>) -> Vec<kvm_msr_entry> {
    msrs.sort_by_key(|msr| match msr.index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    });
    msrs
}

/// Gives the TSC the rate that the guest has measured, where it differs and the CPU can.
fn set_tsc_rate(fd: &VcpuFd, index: u32, khz: u32) {
    let here = fd.get_tsc_khz().unwrap_or(0);
    if khz == 0 || u64::from(khz.abs_diff(here)) * TSC_TOLERANCE <= u64::from(khz) {
        return;
    }
    if let Err(error) = fd.set_tsc_khz(khz) {
        tracing::warn!(
            vcpu = index, khz, here, %error,
            "the guest's TSC changes its rate: kvmclock follows, a TSC clock source would not"
        );
    }
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

/// Whether two lists say the same, field by field.
fn same(one: &[kvm_cpuid_entry2], other: &[kvm_cpuid_entry2]) -> bool {
    one.as_bytes() == other.as_bytes()
}

/// Reads these MSRs. Those that KVM lists and does not give are removed from the list: the next
/// time takes one call.
fn get_msrs(fd: &VcpuFd, indices: &mut Vec<u32>) -> Result<Vec<kvm_msr_entry>, VcpuStateError> {
    let step = "reading MSRs";
    loop {
        let entries: Vec<_> = indices.iter().map(|index| entry(*index, 0)).collect();
        let mut msrs = Msrs::from_entries(&entries)
            .map_err(|error| VcpuStateError { step: step.into(), reason: format!("{error:?}") })?;
        // KVM stops at the first that it does not give.
        let count = check(step, fd.get_msrs(&mut msrs))?;
        if count >= indices.len() {
            return Ok(msrs.as_slice().to_vec());
        }
        indices.remove(count);
    }
}

/// Writes these MSRs. One that cannot be written is an error unless it is to be zero: then there
/// is nothing in it that the guest could miss.
fn set_msrs(fd: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<(), VcpuStateError> {
    let step = "setting MSRs";
    let mut rest = msrs;
    while !rest.is_empty() {
        let batch = Msrs::from_entries(rest)
            .map_err(|error| VcpuStateError { step: step.into(), reason: format!("{error:?}") })?;
        let count = check(step, fd.set_msrs(&batch))?.min(rest.len());
        if let Some(refused) = rest.get(count)
            && refused.data != 0
        {
            let (index, value) = (refused.index, refused.data);
            let reason = format!("KVM refuses {value:#x} in MSR {index:#x}");
            return Err(VcpuStateError { step: step.into(), reason });
        }
        rest = &rest[(count + 1).min(rest.len())..];
    }
    Ok(())
}

fn check<T>(step: &str, result: Result<T, kvm_ioctls::Error>) -> Result<T, VcpuStateError> {
    result.map_err(|error| VcpuStateError { step: step.into(), reason: error.to_string() })
}

/// Writes a structure of the kernel's interface, whose layout never changes.
pub(super) fn write(out: &mut Encoder, value: &(impl IntoBytes + Immutable)) {
    out.raw(value.as_bytes());
}

/// Reads what [`write`] wrote.
pub(super) fn read<T: FromBytes>(
    fields: &mut Decoder<'_>,
    field: &'static str,
) -> Result<T, StateError> {
    let bytes = fields.raw(field, size_of::<T>())?;
    T::read_from_bytes(bytes).map_err(|_| StateError::value(field, bytes.len(), "its size"))
}

fn bounded(count: u32, field: &'static str) -> Result<u32, StateError> {
    if count > ENTRIES_MAX {
        let (value, limit) = (count as usize, ENTRIES_MAX as usize);
        return Err(StateError::TooLarge { field, value, limit });
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tsc_comes_before_its_deadline() {
        let msrs = [MSR_TSC_DEADLINE, 0x174, MSR_TSC, 0x175].map(|index| entry(index, 1));
        let order: Vec<_> = in_order(msrs.to_vec()).iter().map(|msr| msr.index).collect();
        assert_eq!(order, [MSR_TSC, 0x174, 0x175, MSR_TSC_DEADLINE]);
    }

    /// Clocks and syscall entries move; counters and VMX do not.
    #[test]
    fn what_belongs_to_a_guest() {
        for msr in [MSR_TSC, MSR_TSC_DEADLINE, 0xc000_0080, 0xc000_0082, 0x4b56_4d01, 0x3a, 0x277] {
            assert!(is_saved(msr), "{msr:#x}");
        }
        for msr in [0x480, 0xc1, 0x186, 0xc001_0200, 0x38f] {
            assert!(!is_saved(msr), "{msr:#x}");
        }
    }
}
