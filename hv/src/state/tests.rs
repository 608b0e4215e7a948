//! The container: what is written is read, what is damaged is refused, nothing panics.

use proptest::prelude::*;

use super::*;
use crate::machine::migratable::{MachineState, StateSection};

fn states() -> impl Strategy<Value = MachineState> {
    let one = (
        0..kind::ALL.len(),
        any::<u32>(),
        any::<u32>(),
        prop::collection::vec(any::<u8>(), 0..200),
    )
        .prop_map(|(kind, instance, version, data)| StateSection {
            kind: kind::ALL[kind].name.to_owned(),
            instance,
            version,
            data,
        });
    prop::collection::vec(one, 1..20).prop_map(|mut sections| {
        sections.sort_by(|a, b| (&a.kind, a.instance).cmp(&(&b.kind, b.instance)));
        sections.dedup_by(|a, b| a.kind == b.kind && a.instance == b.instance);
        MachineState { sections }
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read(state in states()) {
        prop_assert_eq!(decode(&encode(&state).unwrap()).unwrap(), state);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = decode(&bytes);
        let mut headed = b"DROVSTAT\x01\x00\x00\x00".to_vec();
        headed.extend_from_slice(&bytes);
        let _ = decode(&headed);
    }

    #[test]
    fn one_damaged_byte_is_noticed(
        state in states(),
        at in any::<prop::sample::Index>(),
        flip in 1u8..,
    ) {
        let mut bytes = encode(&state).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        // The minor number alone is no reason to refuse.
        prop_assert!(decode(&bytes).is_err() || (10..12).contains(&at));
    }

    #[test]
    fn every_cut_is_noticed(state in states(), at in any::<prop::sample::Index>()) {
        let bytes = encode(&state).unwrap();
        prop_assert!(decode(&bytes[..at.index(bytes.len())]).is_err());
    }
}

/// An image with one section of a kind from the future, and one that is known.
fn with_future_section(flags: u16) -> Vec<u8> {
    let mut image = Encoder::new();
    image.raw(b"DROVSTAT");
    image.u16(FORMAT_MAJOR);
    image.u16(FORMAT_MINOR + 1);
    image.u32(2);
    image::write_section(&mut image, 0xfff0, flags, 7, 1, b"from the future");
    image::write_section(&mut image, kind::SERIAL.number, 1, 0, 1, &[3]);
    image.into_bytes()
}

#[test]
fn unknown_sections_are_skipped_when_optional_and_refused_when_mandatory() {
    let state = decode(&with_future_section(0)).unwrap();
    assert_eq!(state.sections, [section(kind::SERIAL, 0, 1, |e| e.u8(3))]);
    assert_eq!(
        decode(&with_future_section(1)),
        Err(StateError::UnknownMandatory { kind: 0xfff0, instance: 7 })
    );
}

#[test]
fn twice_the_same_section_is_refused() {
    let vcpu = section(kind::VCPU, 1, 1, |_| {});
    let state = MachineState { sections: vec![vcpu.clone(), vcpu] };
    let duplicate = Err(StateError::Duplicate { kind: "vcpu", instance: 1 });
    assert_eq!(encode(&state).map(|_| ()), duplicate);
}

#[test]
fn a_newer_section_names_what_is_accepted() {
    let section = section(kind::VCPU, 2, 3, |_| {});
    let error = fields(&section, 2).unwrap_err().to_string();
    assert_eq!(error, "state: section vcpu/2 has version 3; accepted: 1 to 2");
}

#[test]
fn fields_read_as_they_were_written() {
    let mut e = Encoder::new();
    e.u8(1);
    e.bool(true);
    e.u16(0x0203);
    e.u32(0x0405_0607);
    e.u64(0x0809_0a0b_0c0d_0e0f);
    e.bytes(b"tail");
    let bytes = e.into_bytes();
    let mut d = Decoder::new(&bytes);
    assert_eq!(d.u8("a"), Ok(1));
    assert_eq!(d.bool("b"), Ok(true));
    assert_eq!(d.u16("c"), Ok(0x0203));
    assert_eq!(d.u32("d"), Ok(0x0405_0607));
    assert_eq!(d.u64("e"), Ok(0x0809_0a0b_0c0d_0e0f));
    let too_large = StateError::TooLarge { field: "f", value: 4, limit: 3 };
    assert_eq!(d.clone().bytes("f", 3), Err(too_large));
    assert_eq!(d.bytes("f", 4), Ok(&b"tail"[..]));
    assert_eq!(d.finish("all"), Ok(()));
}

/// The image of version 1 is kept for ever: what wrote it may still run somewhere.
#[test]
fn the_image_of_version_1_is_still_read_and_written() {
    let state = MachineState {
        sections: vec![
            section(kind::VM, 0, 1, |e| e.u64(128 << 20)),
            section(kind::VCPU, 0, 1, |e| e.raw(b"registers")),
            section(kind::VCPU, 1, 1, |e| e.raw(b"more registers")),
            section(kind::SERIAL, 0, 2, |_| {}),
        ],
    };
    let golden: &[u8] = include_bytes!("../../tests/fixtures/state-v1.bin");
    assert_eq!(decode(golden).unwrap(), state);
    assert_eq!(encode(&state).unwrap(), golden);
}
