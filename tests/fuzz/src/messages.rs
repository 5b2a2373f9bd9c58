//! Messages of both sides, as bytes.

use ferry_pages::{Layout, Run};
use ferry_protocol::{
    Hello, MAX_HELLO_BYTES, NotFerry, PackedPages, Spooled, ToDepot, ToDestination, ToReader,
    ToSource, wire,
};
use serde::{Serialize, de::DeserializeOwned};

/// The first byte says which kind of message.
pub fn messages(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 7 {
        0 => hello(data),
        1 => to_destination(data),
        2 => to_source(data),
        3 => drop(read::<ToDepot>(data)),
        4 => drop(read::<ToReader>(data)),
        5 => drop(read::<Spooled>(data).map(|spooled| spooled.reattach(&layout()))),
        _ => pages(data),
    }
}

/// Insists that what is accepted is written as it came: no message has two forms.
fn read<T: Serialize + DeserializeOwned>(data: &[u8]) -> Option<T> {
    let message = wire::decode::<T>(data).ok()?;
    let written = wire::encode(&message).expect("it came in as many bytes");
    if written != data {
        // But for a time with more than a second's nanoseconds, which is put right.
        assert_eq!(written.len(), data.len());
        let again = wire::decode::<T>(&written).expect("our own");
        assert!(wire::encode(&again).expect("as before") == written);
        let differ = written.iter().zip(data).filter(|(a, b)| a != b).count();
        assert!(differ <= size_of::<u64>() + size_of::<u32>(), "{differ} bytes");
    }
    Some(message)
}

fn hello(data: &[u8]) {
    match Hello::decode(data) {
        Ok(hello) => {
            assert!(hello.encode() == data && data.len() <= MAX_HELLO_BYTES);
        }
        // A stranger is told from a newer Ferry.
        Err(e) => assert_eq!(e == NotFerry::Magic, !data.starts_with(b"ferry\0\r\n")),
    }
}

fn to_destination(data: &[u8]) {
    match read(data) {
        Some(ToDestination::Offer { spec, .. }) => {
            let Ok(layout) = spec.layout() else { return };
            assert_eq!(layout.pages() * 4096, spec.memory_bytes());
            within(&PackedPages::pack(&layout.all()), &layout);
        }
        Some(ToDestination::Commit { owed, .. }) => within(&owed, &layout()),
        _ => {}
    }
}

fn to_source(data: &[u8]) {
    match read(data) {
        Some(ToSource::Recalls(old)) => within(&old.pages, &layout()),
        Some(ToSource::RoundDone { lacking: pages, .. })
        | Some(ToSource::GoOn { held: pages } | ToSource::Lacks { owed: pages }) => {
            within(&pages, &layout());
        }
        _ => {}
    }
}

/// Bytes of packed pages, without a message around them.
fn pages(data: &[u8]) {
    let message = [&(data.len() as u64).to_le_bytes(), data].concat();
    within(&wire::decode(&message).expect("bytes"), &layout());
}

fn layout() -> Layout {
    let extents = vec![
        Run::new(0, 1000),
        Run::new(1000, 24),
        Run::new(1 << 20, 1 << 18),
        Run::new(1 << 39, 1 << 31),
    ];
    Layout::new(extents).expect("a layout")
}

/// Insists that no page is outside of `layout`, and that they are packed and unpacked as they are.
fn within(packed: &PackedPages, layout: &Layout) {
    let Ok(pages) = packed.unpack(layout) else { return };
    let inside: u64 = layout.extents().iter().map(|extent| pages.count_in(*extent)).sum();
    assert_eq!(inside, pages.len());
    assert_eq!(PackedPages::pack(&pages).unpack(layout), Ok(pages));
}
