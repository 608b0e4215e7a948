//! Whether two machines are alike enough: checked before anything is copied.

use kvm_bindings::kvm_cpuid_entry2;

use crate::state::{Decoder, Encoder, StateError};

/// Most feature words that a source may name.
const WORDS_MAX: usize = 64;
/// Most interfaces that a source may name.
const INTERFACES_MAX: usize = 16;
const UID_BYTES_MAX: usize = 64;
/// Most disks that a source may name.
pub(super) const DISKS_MAX: usize = 16;
const SERIAL_BYTES_MAX: usize = 64;

/// One register of CPUID whose bits are features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeatureWord {
    /// EAX of the question.
    pub leaf: u32,
    /// ECX of the question.
    pub subleaf: u32,
    /// 0 to 3: EAX, EBX, ECX, EDX of the answer.
    pub register: u8,
    /// The features.
    pub bits: u32,
}

/// One disk, as both sides must have it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskShape {
    /// What the guest finds as its serial number.
    pub serial: String,
    /// Its length.
    pub bytes: u64,
    /// The guest can read it only.
    pub read_only: bool,
    /// Both nodes see the same volume: nothing is copied.
    pub shared: bool,
}

/// What must fit for a machine to move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// The domain's uid.
    pub uid: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// MAC addresses of the interfaces, in order.
    pub interfaces: Vec<[u8; 6]>,
    /// The disks, in order.
    pub disks: Vec<DiskShape>,
    /// On a source: what the guest was shown. On a destination: what it could show.
    pub cpu_features: Vec<FeatureWord>,
}

/// The registers whose bits are features; others hold numbers, which the vCPU's state carries.
const FEATURE_REGISTERS: [(u32, u32, u8); 17] = [
    (0x0000_0001, 0, 2),
    (0x0000_0001, 0, 3),
    (0x0000_0007, 0, 1),
    (0x0000_0007, 0, 2),
    (0x0000_0007, 0, 3),
    (0x0000_0007, 1, 0),
    (0x0000_000d, 0, 0),
    (0x0000_000d, 1, 0),
    (0x4000_0001, 0, 0),
    (0x8000_0001, 0, 2),
    (0x8000_0001, 0, 3),
    (0x8000_0007, 0, 1),
    (0x8000_0007, 0, 3),
    (0x8000_0008, 0, 1),
    (0x8000_000a, 0, 3),
    (0x8000_0021, 0, 0),
    (0x0000_0007, 2, 3),
];
/// Bits of those registers that are no features of the host.
const NOT_FEATURES: [(u32, u32, u8, u32); 2] = [
    // MONITOR follows MISC_ENABLE, OSXSAVE follows CR4, HYPERVISOR is ours to set; x2APIC and the
    // TSC deadline timer come with KVM's irqchip, whatever it lists.
    (1, 0, 2, 1 << 3 | 1 << 27 | 1 << 31 | 1 << 21 | 1 << 24),
    // OSPKE follows CR4.
    (7, 0, 2, 1 << 4),
];

/// The feature words among these CPUID entries.
pub fn cpu_features(entries: &[kvm_cpuid_entry2]) -> Vec<FeatureWord> {
    let word = |(leaf, subleaf, register)| {
        let entry = entries.iter().find(|e| e.function == leaf && e.index == subleaf)?;
        let shown = [entry.eax, entry.ebx, entry.ecx, entry.edx][usize::from(register)];
        let here = |not: &&(u32, u32, u8, u32)| (not.0, not.1, not.2) == (leaf, subleaf, register);
        let bits = shown & !NOT_FEATURES.iter().find(here).map_or(0, |not| not.3);
        Some(FeatureWord { leaf, subleaf, register, bits })
    };
    FEATURE_REGISTERS.into_iter().filter_map(word).collect()
}

impl Shape {
    /// Whether a machine of the source's shape can go on in this one; if not, why.
    pub fn accepts(&self, source: &Self) -> Result<(), String> {
        if self.uid != source.uid {
            return Err(format!("uid: {}; accepted: {}", source.uid, self.uid));
        }
        if self.vcpus != source.vcpus {
            return Err(format!("vcpus: {}; accepted: {}", source.vcpus, self.vcpus));
        }
        if self.memory_bytes != source.memory_bytes {
            let (theirs, mine) = (source.memory_bytes, self.memory_bytes);
            return Err(format!("memory_bytes: {theirs}; accepted: {mine}"));
        }
        if self.interfaces != source.interfaces {
            let (theirs, mine) = (&source.interfaces, &self.interfaces);
            return Err(format!("interfaces: {theirs:02x?}; accepted: {mine:02x?}"));
        }
        self.accepts_disks(source)?;
        for word in &source.cpu_features {
            let mine = self.cpu_features.iter().find(|mine| {
                (mine.leaf, mine.subleaf, mine.register) == (word.leaf, word.subleaf, word.register)
            });
            let missing = word.bits & !mine.map_or(0, |mine| mine.bits);
            if missing != 0 {
                let register = ["eax", "ebx", "ecx", "edx"][usize::from(word.register & 3)];
                return Err(format!(
                    "cpu: CPUID {:#x}.{} {register} lacks bits {missing:#010x} that the guest was shown",
                    word.leaf, word.subleaf
                ));
            }
        }
        Ok(())
    }

    fn accepts_disks(&self, source: &Self) -> Result<(), String> {
        let (theirs, mine) = (source.disks.len(), self.disks.len());
        if theirs != mine {
            return Err(format!("disks: {theirs}; accepted: {mine}"));
        }
        for (index, (mine, theirs)) in self.disks.iter().zip(&source.disks).enumerate() {
            let refuse = |field: &str, theirs: String, mine: String| {
                Err(format!("disks[{index}].{field}: {theirs}; accepted: {mine}"))
            };
            if mine.serial != theirs.serial {
                return refuse(
                    "serial",
                    format!("{:?}", theirs.serial),
                    format!("{:?}", mine.serial),
                );
            }
            if mine.bytes != theirs.bytes {
                return refuse("bytes", theirs.bytes.to_string(), mine.bytes.to_string());
            }
            if mine.read_only != theirs.read_only {
                return refuse(
                    "read_only",
                    theirs.read_only.to_string(),
                    mine.read_only.to_string(),
                );
            }
            if mine.shared != theirs.shared {
                return refuse("shared", theirs.shared.to_string(), mine.shared.to_string());
            }
        }
        Ok(())
    }

    /// Bytes of the disks whose content is copied.
    pub fn disk_bytes(&self) -> u64 {
        self.disks.iter().filter(|disk| !disk.shared).map(|disk| disk.bytes).sum()
    }

    pub(crate) fn encode(&self, out: &mut Encoder) {
        out.bytes(self.uid.as_bytes());
        out.u32(self.vcpus);
        out.u64(self.memory_bytes);
        out.u8(self.interfaces.len() as u8);
        for mac in &self.interfaces {
            out.raw(mac);
        }
        out.u8(self.disks.len() as u8);
        for disk in &self.disks {
            out.bytes(disk.serial.as_bytes());
            out.u64(disk.bytes);
            out.bool(disk.read_only);
            out.bool(disk.shared);
        }
        out.u8(self.cpu_features.len() as u8);
        for word in &self.cpu_features {
            out.u32(word.leaf);
            out.u32(word.subleaf);
            out.u8(word.register);
            out.u32(word.bits);
        }
    }

    pub(crate) fn decode(fields: &mut Decoder<'_>) -> Result<Self, StateError> {
        let uid = String::from_utf8_lossy(fields.bytes("uid", UID_BYTES_MAX)?).into_owned();
        let vcpus = fields.u32("vcpus")?;
        let memory_bytes = fields.u64("memory_bytes")?;
        let interfaces = (0..count(fields, "interfaces", INTERFACES_MAX)?)
            .map(|_| fields.array("mac"))
            .collect::<Result<_, _>>()?;
        let disks = (0..count(fields, "disks", DISKS_MAX)?)
            .map(|_| {
                let serial = fields.bytes("disk serial", SERIAL_BYTES_MAX)?;
                Ok(DiskShape {
                    serial: String::from_utf8_lossy(serial).into_owned(),
                    bytes: fields.u64("disk bytes")?,
                    read_only: fields.bool("disk read_only")?,
                    shared: fields.bool("disk shared")?,
                })
            })
            .collect::<Result<_, StateError>>()?;
        let cpu_features = (0..count(fields, "cpu features", WORDS_MAX)?)
            .map(|_| {
                Ok(FeatureWord {
                    leaf: fields.u32("cpuid leaf")?,
                    subleaf: fields.u32("cpuid subleaf")?,
                    register: fields.u8("cpuid register")?,
                    bits: fields.u32("cpuid bits")?,
                })
            })
            .collect::<Result<_, StateError>>()?;
        Ok(Self { uid, vcpus, memory_bytes, interfaces, disks, cpu_features })
    }
}

fn count(fields: &mut Decoder<'_>, field: &'static str, limit: usize) -> Result<usize, StateError> {
    let value = usize::from(fields.u8(field)?);
    if value > limit { Err(StateError::TooLarge { field, value, limit }) } else { Ok(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> Shape {
        let word = FeatureWord { leaf: 7, subleaf: 0, register: 1, bits: 0b1010 };
        Shape {
            uid: "u".into(),
            vcpus: 2,
            memory_bytes: 1 << 20,
            interfaces: vec![[1; 6]],
            disks: vec![DiskShape { serial: "root".into(), bytes: 1024, ..Default::default() }],
            cpu_features: vec![word],
        }
    }

    /// A guest that switches on XSAVE and protection keys sees two bits more than it was given.
    #[test]
    fn bits_that_follow_the_guests_registers_are_no_features() {
        let entry = |function, ecx| kvm_cpuid_entry2 { function, ecx, ..Default::default() };
        let given = cpu_features(&[entry(1, 1), entry(7, 8)]);
        let running = cpu_features(&[entry(1, 1 | 1 << 27), entry(7, 8 | 1 << 4)]);
        assert_eq!(given, running);
        assert!(given.iter().any(|word| word.bits == 8));
    }

    #[test]
    fn a_destination_may_have_more_features_and_nothing_else() {
        let mine = shape();
        let refuse = |change: &dyn Fn(&mut Shape)| {
            let mut source = shape();
            change(&mut source);
            mine.accepts(&source).unwrap_err()
        };
        assert_eq!(mine.accepts(&shape()), Ok(()));
        assert_eq!(refuse(&|s| s.vcpus = 3), "vcpus: 3; accepted: 2");
        assert_eq!(refuse(&|s| s.memory_bytes = 9), "memory_bytes: 9; accepted: 1048576");
        assert_eq!(refuse(&|s| s.uid = "v".into()), "uid: v; accepted: u");
        assert!(refuse(&|s| s.interfaces.clear()).starts_with("interfaces: []"));
        assert_eq!(refuse(&|s| s.disks.clear()), "disks: 0; accepted: 1");
        assert_eq!(refuse(&|s| s.disks[0].bytes = 512), "disks[0].bytes: 512; accepted: 1024");
        let serial = refuse(&|s| s.disks[0].serial = "data".into());
        assert_eq!(serial, "disks[0].serial: \"data\"; accepted: \"root\"");
        let read_only = refuse(&|s| s.disks[0].read_only = true);
        assert_eq!(read_only, "disks[0].read_only: true; accepted: false");
        assert_eq!(refuse(&|s| s.disks[0].shared = true), "disks[0].shared: true; accepted: false");
        assert_eq!(
            refuse(&|s| s.cpu_features[0].bits = 0b110),
            "cpu: CPUID 0x7.0 ebx lacks bits 0x00000004 that the guest was shown"
        );
        let mut fewer = shape();
        fewer.cpu_features[0].bits = 0b10;
        assert_eq!(mine.accepts(&fewer), Ok(()));
    }
}
