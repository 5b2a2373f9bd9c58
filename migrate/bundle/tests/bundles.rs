//! What is saved comes back: alone, in chains, merged; and a save replaces a bundle or leaves it.

mod model;

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use ferry_bundle::{Blob, BundleError, Chain, Draft, Haste, Local, Manifest, Pages, Shelf, merge};
use ferry_pages::Run;
use model::{
    EXTENTS, MACHINE, Memory, assert_holds, copy, file, kinds, open, page, read, save, some_memory,
    spec, state,
};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// Changes memory as a busy guest does, and puts every change into `draft` as it is made.
fn churn(memory: &mut Memory, dice: &mut SmallRng, draft: &mut Draft) {
    for _ in 0..dice.random_range(0..900) {
        let (start, pages) = EXTENTS[usize::try_from(dice.random_range(0..2)).unwrap()];
        let gfn = start + dice.random_range(0..pages);
        match dice.random_range(0..4) {
            0 => {
                memory.remove(&gfn);
                draft.put_zero(gfn).unwrap();
            }
            // Few words, so that a page is often what it was in a base.
            n => {
                let new = page(1 + dice.random_range(0..3), n == 1);
                draft.put(gfn, &new).unwrap();
                memory.insert(gfn, new);
            }
        }
    }
}

#[test]
fn the_last_copy_of_each_page_counts_in_any_order_and_in_any_chain() {
    for seed in 0..12 {
        let dir = tempfile::tempdir().unwrap();
        let (mut dice, mut memory, mut base) = (SmallRng::seed_from_u64(seed), Memory::new(), None);
        for bundle in 0..4 {
            let here = dir.path().join(format!("{bundle}"));
            let mut draft = Draft::begin(&here, spec(), base.clone()).unwrap();
            churn(&mut memory, &mut dice, &mut draft);
            draft.commit(MACHINE, &state()).unwrap();
            assert_holds(&here, &memory);
            base = Some(open(&here).unwrap());
        }
        assert_eq!(base.unwrap().layers().len(), 4);
    }
}

#[test]
fn a_merged_chain_is_one_bundle_of_the_same_content_and_id() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut memory = some_memory();
    save(&at("full"), &memory, None).unwrap();
    memory.insert(5, page(99, true));
    memory.remove(&7);
    save(&at("second"), &memory, Some(&open(&at("full")).unwrap())).unwrap();
    let record = open(&at("second")).unwrap().record().to_vec();
    let before = memory.clone();
    memory.insert(7, page(1, false));
    memory.remove(&1024);
    save(&at("third"), &memory, Some(&open(&at("second")).unwrap())).unwrap();

    let chain = open(&at("third")).unwrap();
    merge(&chain, &at("elsewhere")).unwrap();
    assert_holds(&at("elsewhere"), &memory);
    assert_eq!(open(&at("elsewhere")).unwrap().layers().len(), 1);
    assert_eq!(Manifest::read(&at("elsewhere")).unwrap().id, chain.manifest().id);

    // In its own place, it is still the base of those that are based on it.
    merge(&open(&at("second")).unwrap(), &at("second")).unwrap();
    std::fs::remove_dir_all(at("full")).unwrap();
    assert_holds(&at("second"), &before);
    assert_eq!(record, [Run::new(3, 1), Run::new(0, 3), Run::new(4, 1), Run::new(1030, 1)]);
    assert_eq!(open(&at("second")).unwrap().record(), record, "the latest first, merged or not");
    assert_holds(&at("third"), &memory);
    merge(&open(&at("third")).unwrap(), &at("third")).unwrap();
    let stale = merge(&chain, &at("third")).unwrap_err().to_string();
    assert!(stale.contains("saved over meanwhile"), "{stale}");
    assert_eq!(kinds(&at("second")), ["manifest.json", "memory", "state"]);
}

#[test]
fn what_is_as_in_the_base_or_zero_takes_no_room() {
    let dir = tempfile::tempdir().unwrap();
    let (full, next) = (dir.path().join("full"), dir.path().join("next"));
    let mut memory: Memory = (0..600).map(|gfn| (gfn, page(gfn + 1, true))).collect();
    let first = save(&full, &memory, None).unwrap();
    assert!(first.memory.bytes > 600 * 4096, "these pages cannot be compressed");
    memory.insert(10, page(0xabcd, true));
    memory.remove(&11);
    let second = save(&next, &memory, Some(&open(&full).unwrap())).unwrap();
    assert_eq!((second.memory.data_pages, second.memory.zero_pages), (1, 1));
    assert!(second.memory.bytes < 2 * 4096, "{second:?}");
    assert_holds(&next, &memory);

    let untouched = save(&dir.path().join("empty"), &Memory::new(), None).unwrap();
    assert!(untouched.memory.bytes < 150, "{untouched:?}");
    let easy: Memory = (0..600).map(|gfn| (gfn, page(7, false))).collect();
    let easy = save(&dir.path().join("easy"), &easy, None).unwrap();
    assert!(easy.memory.bytes < first.memory.bytes / 20, "{easy:?}");
}

#[test]
fn saving_over_a_bundle_replaces_it_and_a_draft_that_is_dropped_leaves_it() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path().join("b");
    let (old, new) = (some_memory(), Memory::from([(4, page(4, true))]));
    save(&here, &old, None).unwrap();
    // A reader keeps what it opened.
    let reading = open(&here).unwrap();

    let mut draft = Draft::begin(&here, spec(), None).unwrap();
    draft.put(9, &page(1, true)).unwrap();
    let second = Draft::begin(&here, spec(), None);
    assert!(matches!(second, Err(BundleError::Busy { .. })), "two writers at once");
    drop(draft);
    assert_holds(&here, &old);
    assert_eq!(kinds(&here), ["manifest.json", "memory", "state"]);

    save(&here, &new, None).unwrap();
    assert_holds(&here, &new);
    assert_eq!(kinds(&here), ["manifest.json", "memory", "state"]);
    assert_eq!(model::read(&reading).unwrap().0, old);

    let never = dir.path().join("never");
    drop(Draft::begin(&never, spec(), None).unwrap());
    assert!(!never.exists(), "a draft that is dropped leaves no directory");
}

#[test]
fn what_a_killed_save_left_disturbs_nobody_and_is_removed_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let (here, new) = (dir.path().join("b"), dir.path().join("new"));
    save(&here, &some_memory(), None).unwrap();
    // A copy of the directory at such a moment is what a crash leaves.
    let snapshots = |here: &Path, to: &Path| {
        let mut draft = Draft::begin(here, spec(), None).unwrap();
        for gfn in 0..200 {
            draft.put(gfn, &page(gfn + 1, true)).unwrap();
        }
        copy(here, to);
    };
    let killed = dir.path().join("killed");
    snapshots(&here, &killed);
    assert_eq!(kinds(&killed), ["manifest.json", "memory", "memory", "state"]);
    assert_holds(&killed, &some_memory());
    save(&killed, &Memory::new(), None).unwrap();
    assert_holds(&killed, &Memory::new());
    assert_eq!(kinds(&killed), ["manifest.json", "memory", "state"]);

    // The first save to a new directory.
    let killed = dir.path().join("killed-new");
    snapshots(&new, &killed);
    assert!(matches!(open(&killed), Err(BundleError::NotABundle { .. })));
    save(&killed, &some_memory(), None).unwrap();
    assert_holds(&killed, &some_memory());
}

#[test]
fn a_directory_that_is_something_else_is_refused_and_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("thesis.txt"), "work of years").unwrap();
    let refused = |here: &Path, words: &str| {
        let error = save(here, &some_memory(), None).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("will not save"), "{error}");
    };
    refused(dir.path(), "thesis.txt");
    std::fs::write(dir.path().join("manifest.json"), r#"{"format": "npm", "version": 3}"#).unwrap();
    refused(dir.path(), "`npm`");
    std::fs::write(dir.path().join("manifest.json"), r#"{"name": "a web page"}"#).unwrap();
    refused(dir.path(), "format");
    assert_eq!(kinds(dir.path()), ["manifest.json", "thesis.txt"]);
    let a_file = dir.path().join("thesis.txt");
    assert!(save(&a_file, &some_memory(), None).is_err());
    assert_eq!(std::fs::read_to_string(a_file).unwrap(), "work of years");

    // In a bundle, what is not the bundle's is left alone.
    let here = dir.path().join("b");
    save(&here, &some_memory(), None).unwrap();
    std::fs::write(here.join("notes"), "of the operator").unwrap();
    save(&here, &Memory::new(), None).unwrap();
    assert!(here.join("notes").exists());
}

#[test]
fn a_chain_is_found_by_its_hint_or_where_the_caller_says_and_only_the_right_base_serves() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let memory = some_memory();
    save(&at("base"), &memory, None).unwrap();
    let base = open(&at("base")).unwrap();
    let same = save(&at("base"), &memory, Some(&base)).unwrap_err().to_string();
    assert!(same.contains("would replace"), "{same}");
    let mut changed = memory.clone();
    changed.insert(3, page(1234, true));
    save(&at("next"), &changed, Some(&base)).unwrap();

    // Copied together, they find each other.
    std::fs::create_dir(at("away")).unwrap();
    copy(&at("base"), &at("away/base"));
    copy(&at("next"), &at("away/next"));
    std::fs::rename(at("base"), at("moved")).unwrap();
    assert_holds(&at("away/next"), &changed);

    let missing = open(&at("next")).unwrap_err();
    assert!(matches!(missing, BundleError::BaseMissing { .. }), "{missing}");
    assert!(missing.to_string().contains(&base.manifest().id.to_string()), "{missing}");
    Chain::open(&at("next"), &[at("nowhere"), at("moved")]).unwrap();

    // Another bundle in the base's place, of the same memory even.
    save(&at("base"), &memory, None).unwrap();
    let another = open(&at("next")).unwrap_err();
    assert!(matches!(another, BundleError::BaseIsAnother { .. }), "{another}");
    Chain::open(&at("next"), &[at("moved")]).unwrap();
}

#[test]
fn a_base_of_another_machine_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    save(&at("base"), &some_memory(), None).unwrap();
    let base = open(&at("base")).unwrap();
    let machine = base.manifest().machine;
    base.check_base_of(machine, &EXTENTS).unwrap();
    let other = ferry_bundle::BundleId(77);
    let words = base.check_base_of(other, &EXTENTS).unwrap_err().to_string();
    assert!(words.contains("web1") && words.contains(&other.to_string()), "{words}");
    assert!(base.check_base_of(machine, &EXTENTS[..1]).is_err());

    // A writer that did not ask is found out by the reader.
    Draft::begin(&at("next"), spec(), Some(base)).unwrap().commit(77, &state()).unwrap();
    assert!(matches!(open(&at("next")), Err(BundleError::OtherMachine { .. })));
}

#[test]
fn a_chain_has_an_end() {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: usize| dir.path().join(format!("{n}"));
    save(&at(0), &Memory::new(), None).unwrap();
    for n in 1..64 {
        save(&at(n), &Memory::new(), Some(&open(&at(n - 1)).unwrap())).unwrap();
    }
    let last = open(&at(63)).unwrap();
    let full = last.check_base_of(last.manifest().machine, &EXTENTS).unwrap_err().to_string();
    assert!(full.contains("merge"), "{full}");
    save(&at(64), &Memory::new(), Some(&last)).unwrap();
    assert!(matches!(open(&at(64)), Err(BundleError::ChainTooLong { .. })));
}

#[test]
fn a_newer_version_is_refused_by_readers_and_by_writers() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path().join("b");
    save(&here, &some_memory(), None).unwrap();
    let path = file(&here, "manifest.json");
    let text = std::fs::read_to_string(&path)
        .unwrap()
        .replace("\"version\": 2,\n  \"id\"", "\"version\": 3, \"new\": [], \n  \"id\"");
    std::fs::write(&path, &text).unwrap();
    for error in [open(&here).unwrap_err(), save(&here, &Memory::new(), None).unwrap_err()] {
        assert!(matches!(error, BundleError::Newer { version: 3, reads: 2, .. }), "{error}");
        assert!(error.to_string().contains("update"), "{error}");
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
}

/// This host's directories, with every read noted.
#[derive(Clone, Debug, Default)]
struct Noted(Arc<Mutex<Vec<(u64, usize, Haste)>>>);

#[derive(Debug)]
struct NotedBlob(Box<dyn Blob>, Noted);

impl Shelf for Noted {
    fn open(&self, path: &Path) -> io::Result<Box<dyn Blob>> {
        Ok(Box::new(NotedBlob(Local.open(path)?, self.clone())))
    }
}

impl Blob for NotedBlob {
    fn bytes(&self) -> io::Result<u64> {
        self.0.bytes()
    }

    fn read_exact_at(&self, out: &mut [u8], at: u64, haste: Haste) -> io::Result<()> {
        self.1.0.lock().unwrap().push((at, out.len(), haste));
        self.0.read_exact_at(out, at, haste)
    }
}

#[test]
fn a_page_costs_one_read_of_its_frame_and_all_pages_one_read_of_each() {
    let dir = tempfile::tempdir().unwrap();
    let memory: Memory = (0..700).map(|gfn| (gfn, page(gfn + 1, true))).collect();
    save(&dir.path().join("base"), &memory, None).unwrap();
    let base = open(&dir.path().join("base")).unwrap();
    let mut later = memory.clone();
    later.insert(70, page(9000, true));
    save(&dir.path().join("next"), &later, Some(&base)).unwrap();
    let shelf = Noted::default();
    let chain = Chain::open_on(&shelf, &dir.path().join("next"), &[]).map(Arc::new).unwrap();
    let taken = || std::mem::take(&mut *shelf.0.lock().unwrap());
    assert!(taken().iter().all(|(_, _, haste)| *haste == Haste::Ahead));

    let mut pages = Pages::waited_for(chain.clone());
    for gfn in [600, 70, 71, 0] {
        assert!(pages.page(gfn).unwrap() == Some(later[&gfn].as_slice()));
        let at = chain.place_of(gfn).unwrap().at;
        let reads = taken();
        let [(from, bytes, Haste::Waited)] = reads[..] else { panic!("{gfn}: {reads:?}") };
        assert!(from == at && bytes <= 64 * 4096 + 2048, "{gfn}: {reads:?}");
    }
    assert!(read(&chain).unwrap().0 == later);
    let reads = taken();
    // 700 pages in frames of 64, and the one that changed; then state.
    assert_eq!(reads.len(), 11 + 1 + 1, "{reads:?}");
}
