//! Which CPU a guest sees: what KVM supports, with the machine's own topology, and without what
//! cannot move to another node.
//!
//! Leaf and bit numbers are those of AMD's APM volume 3 appendix E, Intel's SDM volume 2 (CPUID),
//! and Linux' `Documentation/virt/kvm/x86/cpuid.rst`.

use kvm_bindings::kvm_cpuid_entry2;

/// Leaf 1: features and the initial APIC id.
const FEATURES: u32 = 0x1;
const CACHES: u32 = 0x4;
const PERFORMANCE: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const KVM_FEATURES: u32 = 0x4000_0001;
const EXTENDED_FEATURES: u32 = 0x8000_0001;
const POWER: u32 = 0x8000_0007;
const SIZES: u32 = 0x8000_0008;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const AMD_PERFORMANCE: u32 = 0x8000_0022;
const AMD_SVM: u32 = 0x8000_000a;

/// Paravirtual features whose state is in the vCPU's MSRs, or nowhere: clock sources (0, 3, 24),
/// no I/O delay (1), steal time (5), EOI (6), unhalt (7), TLB flush (9), IPI (11), yield (13).
/// Asynchronous page faults keep state in the host, and are left out.
const KVM_FEATURES_KEPT: u32 =
    1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 9 | 1 << 11 | 1 << 13 | 1 << 24;

/// Adapts what KVM supports to vCPU `id` of `vcpus`.
pub(super) fn adapt(supported: &[kvm_cpuid_entry2], id: u32, vcpus: u32) -> Vec<kvm_cpuid_entry2> {
    // Smallest number of id bits that tells all vCPUs apart.
    let id_bits = vcpus.next_power_of_two().trailing_zeros();
    let mut entries: Vec<_> = supported
        .iter()
        .filter(|entry| {
            // No nested guests: their state is not saved. Topology is made below.
            !matches!(entry.function, AMD_SVM | AMD_PERFORMANCE | TOPOLOGY | TOPOLOGY_V2)
        })
        .copied()
        .collect();
    for entry in &mut entries {
        match entry.function {
            FEATURES => features(entry, id, vcpus),
            CACHES => {
                // Each vCPU is a core with caches of its own; all share the package.
                entry.eax = entry.eax & !0xffff_c000 | (vcpus - 1).min(0x3f) << 26;
            }
            PERFORMANCE => {
                // No counters: theirs is not saved.
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            KVM_FEATURES => {
                entry.eax &= KVM_FEATURES_KEPT;
                entry.edx = 0;
            }
            EXTENDED_FEATURES => {
                // Without SVM (2) and counters (23, 24, 28); cores of one package (1) if many.
                entry.ecx &= !(1 << 2 | 1 << 23 | 1 << 24 | 1 << 28 | 1 << 1);
                if vcpus > 1 {
                    entry.ecx |= 1 << 1;
                }
            }
            POWER => {
                // The TSC's rate may change when the guest moves.
                entry.edx &= !(1 << 8);
            }
            SIZES => entry.ecx = (id_bits << 12) | (vcpus - 1),
            AMD_TOPOLOGY => {
                // APIC id; core id with one thread a core; node 0 of 1.
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (id, id, 0, 0);
            }
            _ => {}
        }
    }
    let leaf_max = entries.iter().map(|e| e.function).filter(|f| *f < 0x4000_0000).max();
    for leaf in [TOPOLOGY, TOPOLOGY_V2] {
        if supported.iter().any(|e| e.function == leaf) || leaf_max.is_some_and(|max| max >= leaf) {
            entries.extend(topology(leaf, id, vcpus, id_bits));
        }
    }
    entries
}

fn features(entry: &mut kvm_cpuid_entry2, id: u32, vcpus: u32) {
    /// The TSC-deadline timer; KVM has it, and leaves saying so to us.
    const TSC_DEADLINE: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;
    const VMX: u32 = 1 << 5;
    /// Performance capabilities MSR and 64-bit debug store.
    const PDCM: u32 = 1 << 15;
    const DTES64: u32 = 1 << 2;
    const DEBUG_STORE: u32 = 1 << 21;
    const MANY_THREADS: u32 = 1 << 28;

    entry.ebx = entry.ebx & 0xffff | vcpus << 16 | id << 24;
    entry.ecx = entry.ecx & !(VMX | PDCM | DTES64) | TSC_DEADLINE | HYPERVISOR;
    entry.edx &= !(MANY_THREADS | DEBUG_STORE);
    if vcpus > 1 {
        entry.edx |= MANY_THREADS;
    }
}

/// Two levels: one thread in each core, all cores in the package.
fn topology(leaf: u32, id: u32, vcpus: u32, id_bits: u32) -> [kvm_cpuid_entry2; 3] {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function: leaf,
        index,
        // KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the index counts.
        flags: 1,
        eax: shift,
        ebx: count,
        ecx: index | kind << 8,
        edx: id,
        ..Default::default()
    };
    [level(0, 0, 1, THREAD), level(1, id_bits, vcpus, CORE), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn host() -> Vec<kvm_cpuid_entry2> {
        vec![
            entry(0, 0xd, 0, 0, 0),
            entry(FEATURES, 0, 0x1234_0800, !(1 << 24), u32::MAX),
            entry(TOPOLOGY, 1, 2, 3, 4),
            entry(KVM_FEATURES, u32::MAX, 0, 0, 0),
            entry(EXTENDED_FEATURES, 0, 0, u32::MAX, u32::MAX),
            entry(POWER, 0, 0, 0, u32::MAX),
            entry(SIZES, 0x3028, 0, 0xf00f, 0),
            entry(AMD_SVM, 1, 1, 1, 1),
        ]
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    /// Each vCPU has its own id everywhere, and all agree on how many there are.
    #[test]
    fn topology_is_the_machines() {
        for (vcpus, bits) in [(1, 0), (2, 1), (3, 2), (8, 3)] {
            for id in 0..vcpus {
                let entries = adapt(&host(), id, vcpus);
                assert_eq!(find(&entries, FEATURES, 0).ebx, 0x0800 | vcpus << 16 | id << 24);
                assert_eq!(find(&entries, FEATURES, 0).edx >> 28 & 1 == 1, vcpus > 1);
                assert_eq!(find(&entries, SIZES, 0).ecx, bits << 12 | (vcpus - 1));
                let cores = find(&entries, TOPOLOGY, 1);
                assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (bits, vcpus, 0x201, id));
                assert_eq!(find(&entries, TOPOLOGY, 0).edx, id);
            }
        }
    }

    #[test]
    fn what_cannot_move_is_hidden() {
        let entries = adapt(&host(), 0, 1);
        assert!(entries.iter().all(|e| e.function != AMD_SVM));
        assert_eq!(find(&entries, EXTENDED_FEATURES, 0).ecx & 1 << 2, 0);
        assert_eq!(find(&entries, POWER, 0).edx & 1 << 8, 0);
        assert_eq!(find(&entries, FEATURES, 0).ecx & 1 << 5, 0);
        assert_ne!(find(&entries, FEATURES, 0).ecx & 1 << 24, 0, "KVM has the deadline timer");
        assert_eq!(find(&entries, KVM_FEATURES, 0).eax, KVM_FEATURES_KEPT);
    }
}
