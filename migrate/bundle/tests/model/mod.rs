//! A machine's memory as a map, and bundles of it.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use ferry_bundle::{BundleError, Chain, Committed, Draft, Pages};
use ferry_codec::page_digest;
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use ferry_protocol::{DeviceSpec, MachineSpec, StateWriter};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

pub const MACHINE: u128 = 0x00ff_0000_1234;
/// Frames of the machine: two extents with a hole between them.
pub const EXTENTS: [(u64, u64); 2] = [(0, 700), (1024, 300)];

pub fn spec() -> MachineSpec {
    MachineSpec {
        name: "web1".into(),
        vmm: "test".into(),
        extents: EXTENTS.to_vec(),
        vcpus: 1,
        cpu_features: vec!["avx2".into()],
        devices: vec![DeviceSpec { kind: "serial".into(), instance: 0, version: 1 }],
        config: vec![0, 1, 254, 255],
    }
}

pub fn state() -> Vec<u8> {
    let mut writer = StateWriter::new();
    writer.put("serial", 0, 1, 1, &(42u8, "registers".to_owned())).unwrap();
    writer.finish().unwrap()
}

/// The pages that are not zero.
pub type Memory = BTreeMap<u64, Vec<u8>>;

/// A page with this word all over, or mixed so that it cannot be compressed.
pub fn page(word: u64, hard: bool) -> Vec<u8> {
    let mut dice = SmallRng::seed_from_u64(word);
    let words = (0..PAGE_BYTES / 8).map(|_| if hard { dice.random() } else { word });
    words.flat_map(u64::to_le_bytes).collect()
}

/// Pages 3 to 102, and two more beyond the hole.
pub fn some_memory() -> Memory {
    let gfns = (3..103).chain([1024, 1300]);
    gfns.map(|gfn| (gfn, page(gfn + 1, gfn % 10 == 0))).collect()
}

/// What the guest is said to have written last.
pub fn harvests() -> [PageSet; 2] {
    let set = |runs: &[Run]| runs.iter().copied().collect();
    [set(&[Run::new(0, 5), Run::new(1030, 1)]), set(&[Run::new(3, 1)])]
}

pub fn save(
    dir: &Path,
    memory: &Memory,
    base: Option<&Arc<Chain>>,
) -> Result<Committed, BundleError> {
    let mut draft = Draft::begin(dir, spec(), base.cloned())?;
    draft.record(harvests().iter());
    for (gfn, page) in memory {
        draft.put(*gfn, page)?;
    }
    if let Some(base) = base {
        for gfn in base.data_pages().runs().flat_map(|r| r.start..r.end()) {
            if !memory.contains_key(&gfn) {
                draft.put_zero(gfn)?;
            }
        }
    }
    draft.commit(MACHINE, &state())
}

pub fn open(dir: &Path) -> Result<Arc<Chain>, BundleError> {
    Chain::open(dir, &[]).map(Arc::new)
}

/// All that a restore reads: memory and state.
pub fn read(chain: &Chain) -> Result<(Memory, Vec<u8>), BundleError> {
    let mut memory = Memory::new();
    chain.visit(|run, bytes, digests| {
        assert_eq!(bytes.len(), digests.len() * PAGE_BYTES);
        for (gfn, page) in (run.start..run.end()).zip(bytes.chunks_exact(PAGE_BYTES)) {
            assert!(memory.insert(gfn, page.to_vec()).is_none(), "page {gfn} came twice");
        }
        Ok::<(), BundleError>(())
    })?;
    Ok((memory, chain.state()?))
}

/// Insists that the bundle at `dir` holds `memory`, whichever way it is read.
#[track_caller]
pub fn assert_holds(dir: &Path, memory: &Memory) {
    assert_chain_holds(&open(dir).unwrap(), memory);
}

#[track_caller]
pub fn assert_chain_holds(chain: &Arc<Chain>, memory: &Memory) {
    assert!(read(chain).unwrap() == (memory.clone(), state()), "memory is not what was saved");
    assert_eq!(chain.verify().unwrap().pages, memory.len() as u64);
    assert_eq!(chain.data_pages().len(), memory.len() as u64);
    let sum =
        memory.iter().fold(0u64, |sum, (gfn, page)| sum.wrapping_add(page_digest(*gfn, page)));
    assert_eq!(chain.manifest().memory.digest.0, sum);
    let mut pages = Pages::new(chain.clone());
    for gfn in EXTENTS.iter().flat_map(|e| e.0..e.0 + e.1).step_by(9) {
        let mut seen = Vec::new();
        let frame = pages.frame(gfn, |first, bytes| {
            for (gfn, page) in (first..).zip(bytes.chunks_exact(PAGE_BYTES)) {
                assert!(memory.get(&gfn).is_some_and(|is| is == page), "page {gfn} in its frame");
                seen.push(gfn);
            }
            Ok::<(), BundleError>(())
        });
        frame.unwrap();
        // The page itself first, then all of its frame.
        assert_eq!(seen.first().copied(), memory.contains_key(&gfn).then_some(gfn));
        let all: Vec<u64> = chain.frame_of(gfn).flat_map(|run| run.start..run.end()).collect();
        assert_eq!(seen.get(1..).unwrap_or_default(), all);
        assert!(all.is_empty() || all.contains(&gfn));
    }
    for gfn in EXTENTS.iter().flat_map(|e| e.0..e.0 + e.1).rev() {
        assert!(
            pages.page(gfn).unwrap() == memory.get(&gfn).map(Vec::as_slice),
            "page {gfn} is not what was saved"
        );
    }
}

/// Names of the files in `dir`, without their tokens.
pub fn kinds(dir: &Path) -> Vec<String> {
    let names =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut kinds: Vec<_> = names.map(|n| n.split('-').next().unwrap().to_owned()).collect();
    kinds.sort();
    kinds
}

pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// The file of one kind of the bundle at `dir`.
pub fn file(dir: &Path, kind: &str) -> std::path::PathBuf {
    let mut entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    let found = entries.find(|e| e.file_name().to_str().unwrap().starts_with(kind));
    found.unwrap_or_else(|| panic!("no {kind} in {}", dir.display())).path()
}
