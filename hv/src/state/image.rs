//! The container: a header, sections, each with its own checksum.

use super::kind::SectionKind;
use super::{Decoder, Encoder, SECTION_BYTES_MAX, SECTIONS_MAX, STATE_BYTES_MAX, StateError};
use crate::machine::migratable::{MachineState, StateSection};

const MAGIC: [u8; 8] = *b"DROVSTAT";
/// A reader refuses an image of another major number.
pub const FORMAT_MAJOR: u16 = 1;
/// Grows when optional sections are added; never a reason to refuse.
pub const FORMAT_MINOR: u16 = 0;
const FLAG_MANDATORY: u16 = 1;
/// kind, flags, instance, version, length.
const SECTION_HEADER_BYTES: usize = 2 + 2 + 4 + 4 + 4;

/// A section of `kind`, whose fields `write` writes.
pub fn section(
    kind: SectionKind,
    instance: u32,
    version: u32,
    write: impl FnOnce(&mut Encoder),
) -> StateSection {
    let mut data = Encoder::new();
    write(&mut data);
    StateSection { kind: kind.name.to_owned(), instance, version, data: data.into_bytes() }
}

/// The section of this kind and instance; an error that names it when it is not there.
pub fn find(
    state: &MachineState,
    kind: SectionKind,
    instance: u32,
) -> Result<&StateSection, StateError> {
    let wanted = |s: &&StateSection| s.kind == kind.name && s.instance == instance;
    state.sections.iter().find(wanted).ok_or(StateError::Missing { kind: kind.name, instance })
}

/// A reader of the section's fields, if its version is one of 1 to `newest`.
pub fn fields(section: &StateSection, newest: u32) -> Result<Decoder<'_>, StateError> {
    if section.version == 0 || section.version > newest {
        return Err(StateError::SectionVersion {
            kind: section.kind.clone(),
            instance: section.instance,
            version: section.version,
            newest,
        });
    }
    Ok(Decoder::new(&section.data))
}

/// The image of a state.
///
/// # Errors
/// When a section's kind is not registered, a section appears twice, or something is larger than
/// a reader would accept.
pub fn encode(state: &MachineState) -> Result<Vec<u8>, StateError> {
    check_limit("section count", state.sections.len(), SECTIONS_MAX)?;
    let mut image = Encoder::new();
    image.raw(&MAGIC);
    image.u16(FORMAT_MAJOR);
    image.u16(FORMAT_MINOR);
    // At most SECTIONS_MAX.
    image.u32(state.sections.len() as u32);
    for (index, section) in state.sections.iter().enumerate() {
        check_limit("section payload", section.data.len(), SECTION_BYTES_MAX)?;
        let kind = SectionKind::from_name(&section.kind).ok_or_else(|| {
            StateError::value("section kind", &section.kind, "a kind registered in state::kind")
        })?;
        check_duplicate(&state.sections[..index], kind, section.instance)?;
        write_section(
            &mut image,
            kind.number,
            FLAG_MANDATORY,
            section.instance,
            section.version,
            &section.data,
        );
    }
    check_limit("image", image.len(), STATE_BYTES_MAX)?;
    Ok(image.into_bytes())
}

pub(super) fn write_section(
    image: &mut Encoder,
    kind: u16,
    flags: u16,
    instance: u32,
    version: u32,
    payload: &[u8],
) {
    let mut header = Encoder::new();
    header.u16(kind);
    header.u16(flags);
    header.u32(instance);
    header.u32(version);
    header.u32(payload.len() as u32);
    let header = header.into_bytes();
    let mut crc = crc32fast::Hasher::new();
    crc.update(&header);
    crc.update(payload);
    image.raw(&header);
    image.raw(payload);
    image.u32(crc.finalize());
}

/// Reads and checks an image as a whole. Optional sections of unknown kinds are left out.
///
/// # Errors
/// On anything that `docs/migration-format.md` does not allow; nothing is half read.
pub fn decode(bytes: &[u8]) -> Result<MachineState, StateError> {
    check_limit("image", bytes.len(), STATE_BYTES_MAX)?;
    let mut decoder = Decoder::new(bytes);
    let magic = decoder.array::<8>("magic")?;
    if magic != MAGIC {
        return Err(StateError::Magic { found: magic });
    }
    let major = decoder.u16("format major")?;
    let minor = decoder.u16("format minor")?;
    if major != FORMAT_MAJOR {
        return Err(StateError::Format { major, minor, accepted: FORMAT_MAJOR });
    }
    let count = decoder.u32("section count")? as usize;
    check_limit("section count", count, SECTIONS_MAX)?;
    let mut sections: Vec<StateSection> = Vec::new();
    for _ in 0..count {
        let Some((kind, section)) = read_section(&mut decoder)? else { continue };
        check_duplicate(&sections, kind, section.instance)?;
        sections.push(section);
    }
    decoder.finish("image")?;
    Ok(MachineState { sections })
}

fn read_section(
    decoder: &mut Decoder<'_>,
) -> Result<Option<(SectionKind, StateSection)>, StateError> {
    let mut ahead = decoder.clone();
    let number = decoder.u16("section kind")?;
    let flags = decoder.u16("section flags")?;
    let instance = decoder.u32("section instance")?;
    let version = decoder.u32("section version")?;
    let payload = decoder.bytes("section payload", SECTION_BYTES_MAX)?;
    let covered = ahead.raw("section", SECTION_HEADER_BYTES + payload.len())?;
    let expected = crc32fast::hash(covered);
    let found = decoder.u32("section crc")?;
    if found != expected {
        return Err(StateError::Crc { kind: number, instance, expected, found });
    }
    match SectionKind::from_number(number) {
        Some(kind) => {
            let (name, data) = (kind.name.to_owned(), payload.to_vec());
            Ok(Some((kind, StateSection { kind: name, instance, version, data })))
        }
        None if flags & FLAG_MANDATORY != 0 => {
            Err(StateError::UnknownMandatory { kind: number, instance })
        }
        None => Ok(None),
    }
}

fn check_limit(field: &'static str, value: usize, limit: usize) -> Result<(), StateError> {
    if value > limit { Err(StateError::TooLarge { field, value, limit }) } else { Ok(()) }
}

fn check_duplicate(
    before: &[StateSection],
    kind: SectionKind,
    instance: u32,
) -> Result<(), StateError> {
    if before.iter().any(|s| s.kind == kind.name && s.instance == instance) {
        return Err(StateError::Duplicate { kind: kind.name, instance });
    }
    Ok(())
}
