//! The content of the golden files, the same for every version.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ferry_bundle::{BundleError, Chain, Draft};
use ferry_codec::{
    BatchBuilder, Codec, PackedBuilder, PackedPage, Packer, page_digest, zero_frames,
};
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use ferry_protocol::{
    DeviceSpec, Fetched, Hello, MachineSpec, PackedPages, Recalled, Refusal, RunPermit, StateError,
    StateWriter, ToDepot, ToDestination, ToReader, ToSource, Verdict, wire,
};

/// The machine's lasting number.
pub const MACHINE: u128 = 0x0123_4567_89ab_cdef_0011_2233_4455_6677;
/// The round of the frames.
pub const ROUND: u32 = 3;
/// The pages of the frames.
pub const PAGES: [u64; 4] = [2, 3, 4, 40];
/// The pages of zeros.
pub const ZEROS: [Run; 2] = [Run::new(5, 20), Run::new(130, 8)];
/// What the guest touched last.
pub const RECORD: Run = Run::new(2, 2);
/// Of a bundle that has one.
pub const NEW: u64 = 41;

/// Frame by frame: another byte, with some that do not repeat.
pub fn page(gfn: u64) -> Vec<u8> {
    let mut page = vec![0x60 | gfn.to_le_bytes()[0]; PAGE_BYTES];
    for (at, byte) in (0u8..32).zip(&mut page[64..]) {
        *byte = at.wrapping_mul(at) ^ gfn.to_le_bytes()[0];
    }
    page
}

/// The machine.
pub fn spec() -> MachineSpec {
    MachineSpec {
        name: "golden-1".into(),
        vmm: "test".into(),
        extents: vec![(0, 64), (128, 64)],
        vcpus: 2,
        cpu_features: vec!["avx2".into(), "cpuid.7.0.edx.5".into()],
        devices: vec![DeviceSpec { kind: "serial-16550".into(), instance: 0, version: 1 }],
        config: vec![0, 1, 254, 255],
    }
}

/// Pages as a list travels.
pub fn list() -> PageSet {
    [Run::new(1, 2), Run::new(50, 14), Run::new(128, 64)].into_iter().collect()
}

/// What the section `serial-16550` holds.
pub fn section() -> (u8, String, Vec<u64>) {
    (7, "registers".into(), vec![1, 1 << 40])
}

/// vCPU and device state, as two sections.
///
/// # Errors
/// It is too large.
pub fn state() -> Result<Vec<u8>, StateError> {
    let mut writer = StateWriter::new();
    writer.put("serial-16550", 0, 1, 1, &section())?;
    writer.put("clock", 0, 1, 1, &0x1122_3344_5566_7788u64)?;
    writer.finish()
}

/// How a destination fetched pages.
pub fn fetched() -> Fetched {
    Fetched {
        faults: 1,
        requested: 2,
        waited_by_thread_ns: vec![3, 4],
        took_ns: 5,
        ..Fetched::default()
    }
}

/// First messages of channels, each with a name.
pub fn hellos() -> Vec<(&'static str, Hello)> {
    vec![
        ("control", Hello::Control { version_min: 2, version_max: 2 }),
        ("lane", Hello::Lane { session: 1 << 100, link: 5, lane: 63 }),
        ("urgent", Hello::Urgent { session: 1 << 100, link: 5 }),
        ("rejoin", Hello::Rejoin { session: 1 << 100, done: 9, link: 5 }),
        ("bundles", Hello::Bundles { version: 1 }),
    ]
}

/// Messages of the source, each with a name.
pub fn to_destination() -> Vec<(&'static str, ToDestination)> {
    let keep = Duration::from_millis(60_500);
    vec![
        (
            "offer",
            ToDestination::Offer {
                spec: spec(),
                codecs: 0b10_1111,
                lanes: 2,
                keep,
                machine: Some(MACHINE),
            },
        ),
        ("prepare", ToDestination::Prepare),
        ("round-end", ToDestination::RoundEnd { round: ROUND, batches: 1 << 33 }),
        (
            "commit",
            ToDestination::Commit {
                permit: RunPermit::for_new_machine(MACHINE),
                state: vec![1, 2, 3],
                rounds: vec![(3, 1), (4, 2)],
                owed: PackedPages::pack(&list()),
            },
        ),
        ("abort", ToDestination::Abort { reason: "größer".into() }),
        ("verified", ToDestination::Verified { matches: true }),
        ("stale", ToDestination::Stale { pages: PackedPages::pack(&list()) }),
    ]
}

/// Messages of the destination, each with a name.
pub fn to_source() -> Vec<(&'static str, ToSource)> {
    let pages = || PackedPages::pack(&list());
    let no_post_copy = Some("huge pages".to_owned());
    vec![
        (
            "accepted",
            ToSource::Accepted { version: 2, session: 1 << 100, codecs: 0b1111, no_post_copy },
        ),
        ("recalls", ToSource::Recalls(Recalled { pages: pages(), digests: vec![7; 80] })),
        ("refused", ToSource::Refused { reasons: vec![Refusal::new("memory", "too little")] }),
        ("ready", ToSource::Ready),
        ("round-done", ToSource::RoundDone { round: ROUND, lacking: pages() }),
        ("failed", ToSource::Failed { reason: "no".into() }),
        ("running", ToSource::Running { pages_us: 1, load_us: 2, resume_us: 3 }),
        ("commit-refused", ToSource::CommitRefused { reason: "no".into() }),
        ("digest", ToSource::Digest { sum: Some(u64::MAX), fetched: Some(fetched()) }),
        ("go-on", ToSource::GoOn { held: pages() }),
        ("lacks", ToSource::Lacks { owed: pages() }),
        ("verdict", ToSource::Verdict(Verdict::NeverRan)),
    ]
}

/// What is asked of who lends bundles, each with a name.
pub fn to_depot() -> Vec<(&'static str, ToDepot)> {
    vec![
        ("open", ToDepot::Open { file: 3, path: "a/manifest.json".into() }),
        ("read", ToDepot::Read { file: 3, at: 1 << 40, bytes: 4096 }),
    ]
}

/// What it answers, each with a name.
pub fn to_reader() -> Vec<(&'static str, ToReader)> {
    vec![
        ("opened", ToReader::Opened { bytes: 1 << 40 }),
        ("missing", ToReader::Missing { why: "gone".into() }),
        ("failed", ToReader::Failed { why: "disk".into() }),
        ("data", ToReader::Data { bytes: 4096 }),
    ]
}

/// A frame of the pages by `codec`; of those of zeros, or of those that the destination has.
pub fn frame(codec: Codec) -> Vec<u8> {
    let mut builder = BatchBuilder::new();
    builder.begin(ROUND);
    if codec == Codec::Zero {
        return zero_frames(ROUND, &ZEROS).next().unwrap_or_default().to_vec();
    }
    if codec == Codec::Packed {
        return packed();
    }
    for gfn in PAGES {
        let has = |_| codec == Codec::Same;
        // There is room for four.
        let _ = builder.push_unless(gfn, |place| place.copy_from_slice(&page(gfn)), has);
    }
    let built = builder.finish(codec);
    let same = built.same.map(|(frame, _)| frame);
    same.or(built.frame).unwrap_or_default().to_vec()
}

fn packed() -> Vec<u8> {
    let (mut packer, mut builder) = (Packer::default(), PackedBuilder::default());
    for gfn in PAGES {
        let page = page(gfn);
        let digest = page_digest(gfn, &page);
        let (codec, bytes) = packer.pack(&page);
        let _ = builder.push(&PackedPage { gfn, codec, bytes, digest });
    }
    builder.finish(ROUND).map(|(frame, _)| frame.to_vec()).unwrap_or_default()
}

/// A golden file: its name and what is in it.
pub type File = (String, Vec<u8>);

/// Every golden file but the bundles.
///
/// # Errors
/// Something is too large.
pub fn files() -> Result<Vec<File>, Box<dyn std::error::Error>> {
    let mut files = vec![("state".to_owned(), state()?)];
    for codec in Codec::ALL {
        files.push((format!("frames/{codec}"), frame(codec)));
    }
    for (name, hello) in hellos() {
        files.push((format!("hello/{name}"), hello.encode()));
    }
    for (name, message) in to_destination() {
        files.push((format!("to-destination/{name}"), wire::encode(&message)?));
    }
    for (name, message) in to_source() {
        files.push((format!("to-source/{name}"), wire::encode(&message)?));
    }
    for (name, message) in to_depot() {
        files.push((format!("to-depot/{name}"), wire::encode(&message)?));
    }
    for (name, message) in to_reader() {
        files.push((format!("to-reader/{name}"), wire::encode(&message)?));
    }
    Ok(files)
}

/// A bundle of the pages at `base`, and one at `bundle` that tells the difference: [`NEW`] is there, the first
/// page is zero.
///
/// # Errors
/// It cannot be written.
pub fn write_bundles(base: &Path, bundle: &Path) -> Result<(), BundleError> {
    let state = state().unwrap_or_default();
    let mut draft = Draft::begin(base, spec(), None)?;
    PAGES.into_iter().try_for_each(|gfn| draft.put(gfn, &page(gfn)))?;
    draft.commit(MACHINE, &state)?;
    let mut draft = Draft::begin(bundle, spec(), Some(Arc::new(Chain::open(base, &[])?)))?;
    draft.record([[RECORD].into_iter().collect()].iter());
    draft.put(NEW, &page(NEW))?;
    draft.put_zero(PAGES[0])?;
    draft.commit(MACHINE, &state).map(drop)
}
