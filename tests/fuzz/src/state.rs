//! Sections of state, and what a machine of the reference VMM reads from them.

use arbitrary::{Result, Unstructured};
use ferry_protocol::{StateError, StateReader, StateWriter, wire};
use ferry_refvmm::fuzzing::{Device, read_state};
use serde::ser::{Serialize, SerializeTuple, Serializer};

const MEMORY_BYTES: u64 = 8 << 20;
const KINDS: [&str; 16] = [
    "machine",
    "mp-state",
    "regs",
    "sregs",
    "xsave",
    "xcrs",
    "debugregs",
    "lapic",
    "msrs",
    "vcpu-events",
    "serial-16550",
    "virtio-balloon",
    "pit",
    "pic-master",
    "clock",
    "unheard-of",
];

/// The first byte says which of the ways.
pub fn state(data: &[u8]) {
    let Some((way, data)) = data.split_first() else { return };
    match way % 3 {
        0 => sections(data),
        1 => drop(contents(&mut Unstructured::new(data))),
        _ => balloon(data),
    }
}

/// Whole sections, checksums and all.
fn sections(data: &[u8]) {
    if let Ok(reader) = StateReader::parse(data) {
        read_state(&reader);
        let _ = reader.require_known(&KINDS);
    }
}

/// Written without a length in front.
struct Raw<'a>(&'a [u8]);

impl Serialize for Raw<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        let mut tuple = to.serialize_tuple(self.0.len())?;
        self.0.iter().try_for_each(|byte| tuple.serialize_element(byte))?;
        tuple.end()
    }
}

/// Sections whose checksums are right, with any content.
fn contents(u: &mut Unstructured<'_>) -> Result<()> {
    let mut writer = StateWriter::new();
    let mut first: Vec<(usize, u16, Vec<u8>)> = Vec::new();
    for _ in 0..u.int_in_range(1..=4)? {
        let kind = u.choose_index(KINDS.len())?;
        let (version, min_reader) = (u.int_in_range(0..=2)?, u.int_in_range(0..=2)?);
        let bytes = u.arbitrary_len::<u8>()?;
        let bytes = u.bytes(bytes)?;
        writer.put(KINDS[kind], 0, version, min_reader, &Raw(bytes)).expect("it is small");
        if first.iter().all(|(other, ..)| *other != kind) {
            first.push((kind, min_reader, bytes.to_vec()));
        }
    }
    let written = writer.finish().expect("it is small");
    let reader = StateReader::parse(&written).expect("our own");
    let known = reader.require_known(&KINDS[..KINDS.len() - 1]);
    assert_eq!(known.is_err(), first.iter().any(|(kind, ..)| *kind == KINDS.len() - 1));
    for (kind, min_reader, bytes) in first {
        let kind = KINDS[kind];
        // Read as it was written: by the first of its kind, and by no reader that is too old.
        let read = reader.read::<u64>(kind, 0, 1);
        let expected = (min_reader <= 1).then(|| wire::decode::<u64>(&bytes).ok()).flatten();
        let too_new = matches!(read, Err(StateError::TooNew { .. }));
        assert_eq!((too_new, read.ok()), (min_reader > 1, expected));
    }
    read_state(&reader);
    Ok(())
}

/// What a balloon goes on from.
fn balloon(data: &[u8]) {
    let mut device = Device::new(MEMORY_BYTES).expect("memory");
    if device.restore(data).is_err() {
        return;
    }
    let status = device.balloon().status();
    assert!(status.ballooned_bytes <= MEMORY_BYTES && status.memory_bytes == MEMORY_BYTES);
    let ballooned = device.balloon().ballooned().clone();
    // What can be gone on from once can be so again, and again it is the same.
    let saved = device.save().expect("it is small");
    device.restore(&saved).expect("our own");
    assert_eq!(*device.balloon().ballooned(), ballooned);
    let again = device.save().expect("it is small");
    device.restore(&again).expect("our own");
    assert!(device.save().expect("it is small") == again);
    for offset in 0..0x110 {
        device.read(offset, &mut [0; 4]);
    }
    for queue in 0..6u32 {
        device.write(0x50, &queue.to_le_bytes());
    }
    device.ask_statistics();
}
