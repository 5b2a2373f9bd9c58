//! Bad bundles and bad disks: an error that says so, and the old bundle intact.

mod model;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use ferry_bundle::{BundleError, Chain};
use model::{Memory, assert_holds, file, kinds, open, page, read, save, some_memory};

/// Opens and reads all of it.
fn whole(dir: &Path) -> Result<(Memory, Vec<u8>), BundleError> {
    let chain = open(dir)?;
    chain.verify()?;
    read(&chain)
}

/// Small enough to try every byte: easy pages, one hard page, and a chain of two.
fn small(dir: &Path) -> (Memory, Arc<Chain>) {
    let mut memory: Memory = (8..40).map(|gfn| (gfn, page(gfn, false))).collect();
    save(&dir.join("base"), &memory, None).unwrap();
    let base = open(&dir.join("base")).unwrap();
    memory.insert(9, page(5000, true));
    memory.insert(1030, page(2, false));
    memory.remove(&30);
    save(&dir.join("next"), &memory, Some(&base)).unwrap();
    (memory, base)
}

#[test]
fn a_flipped_byte_anywhere_is_found_or_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (memory, _) = small(dir.path());
    let next = dir.path().join("next");
    let right = whole(&next).unwrap();
    assert!(right.0 == memory);
    for (bundle, kind) in [
        ("next", "manifest.json"),
        ("next", "state"),
        ("next", "memory"),
        ("base", "manifest.json"),
        ("base", "memory"),
    ] {
        let path = file(&dir.path().join(bundle), kind);
        let good = std::fs::read(&path).unwrap();
        let (mut found, mut harmless) = (0, 0);
        for i in 0..good.len() {
            let mut bad = good.clone();
            bad[i] ^= 1 << (i % 8);
            std::fs::write(&path, &bad).unwrap();
            match whole(&next) {
                Ok(read) => {
                    assert!(read == right, "{bundle}/{kind}: byte {i} changed what is read");
                    harmless += 1;
                }
                Err(e) => {
                    let words = e.to_string();
                    let named =
                        words.contains(bundle) && words.contains(dir.path().to_str().unwrap());
                    assert!(named, "{bundle}/{kind}: byte {i}: {words}");
                    found += 1;
                }
            }
        }
        std::fs::write(&path, &good).unwrap();
        // White space of the manifest; pages of the base that a newer bundle hides, when nothing else
        // is in their frame.
        assert!(found > harmless * 5, "{bundle}/{kind}: {found} found, {harmless} harmless");
    }
}

#[test]
fn a_truncated_or_missing_file_is_found() {
    let dir = tempfile::tempdir().unwrap();
    small(dir.path());
    let next = dir.path().join("next");
    for kind in ["manifest.json", "memory", "state"] {
        let path = file(&next, kind);
        let good = std::fs::read(&path).unwrap();
        for length in (0..good.len()).step_by(1 + good.len() / 100) {
            std::fs::write(&path, &good[..length]).unwrap();
            // Of the manifest, the last byte is a line's end.
            assert!(whole(&next).is_err(), "{kind}: {length} of {} bytes", good.len());
        }
        std::fs::remove_file(&path).unwrap();
        let error = whole(&next).unwrap_err().to_string();
        assert!(error.contains(next.to_str().unwrap()), "{error}");
        std::fs::write(&path, &good).unwrap();
    }
    whole(&next).unwrap();
}

#[test]
fn a_memory_file_of_another_bundle_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    save(&one, &some_memory(), None).unwrap();
    save(&two, &some_memory(), None).unwrap();
    std::fs::copy(file(&two, "memory"), file(&one, "memory")).unwrap();
    let error = whole(&one).unwrap_err();
    assert!(matches!(error, BundleError::Damaged { .. }), "{error}");
}

#[test]
fn a_frame_in_another_frames_place_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path().join("b");
    // Two frames of the same length, one after the other.
    let pages = 2 * ferry_bundle::FRAME_PAGES as u64;
    save(&here, &(0..pages).map(|gfn| (gfn, page(gfn + 1, true))).collect(), None).unwrap();
    let chain = open(&here).unwrap();
    let [one, two] = [0, pages - 1].map(|gfn| chain.place_of(gfn).unwrap().at);
    let [one, two] = [one, two].map(|at| usize::try_from(at).unwrap());
    let path = file(&here, "memory");
    let mut bytes = std::fs::read(&path).unwrap();
    let (before, after) = bytes.split_at_mut(two);
    before[one..].swap_with_slice(&mut after[..two - one]);
    std::fs::write(&path, bytes).unwrap();
    let error = whole(&here).unwrap_err().to_string();
    assert!(error.contains("is not the one that the index means"), "{error}");
}

/// Changes text of the manifest at `dir` and makes its checksum right again, as a forger would.
fn forge(dir: &Path, from: &str, to: &str) {
    let path = file(dir, "manifest.json");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{from} is not in {text}");
    let (body, _) = text.rsplit_once("\"checksum\"").unwrap();
    let body = body.replace(from, to);
    let blank = format!("{body}\"checksum\": \"0000000000000000\"\n}}");
    let compact =
        blank.lines().map(|line| line.trim().replacen("\": ", "\":", 1)).collect::<String>();
    let sum = xxhash_rust::xxh3::xxh3_64(compact.as_bytes());
    std::fs::write(&path, format!("{body}\"checksum\": \"{sum:016x}\"\n}}\n")).unwrap();
}

#[test]
fn a_base_with_the_right_id_and_other_content_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let (_, base) = small(dir.path());
    let next = dir.path().join("next");
    let id = base.manifest().id.to_string();
    let other = save(&dir.path().join("base"), &some_memory(), None).unwrap();
    assert!(matches!(open(&next), Err(BundleError::BaseIsAnother { .. })));
    forge(&dir.path().join("base"), &other.id.to_string(), &id);
    open(&dir.path().join("base")).unwrap();
    let error = open(&next).unwrap_err().to_string();
    assert!(error.contains("the pages of the chain have digest"), "{error}");
}

#[test]
fn a_bundle_of_version_1_has_no_record_and_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let old = dir.path().join("old");
    let mut draft = ferry_bundle::Draft::begin(&old, model::spec(), None).unwrap();
    for (gfn, page) in some_memory() {
        draft.put(gfn, &page).unwrap();
    }
    draft.commit(model::MACHINE, &model::state()).unwrap();
    let text = std::fs::read_to_string(file(&old, "manifest.json")).unwrap();
    assert!(!text.contains("record"), "{text}");
    forge(&old, "\"version\": 2,\n  \"id\"", "\"version\": 1,\n  \"id\"");
    assert_holds(&old, &some_memory());
    let old = open(&old).unwrap();
    assert_eq!((old.manifest().version, old.record()), (1, &[][..]));
    // It is a base like any other.
    save(&dir.path().join("next"), &some_memory(), Some(&old)).unwrap();
    assert_holds(&dir.path().join("next"), &some_memory());
}

#[test]
fn a_manifest_whose_numbers_cannot_be_is_an_error_and_never_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let good = dir.path().join("good");
    let part = save(&good, &some_memory(), None).unwrap().memory;
    let huge = u64::MAX.to_string();
    let index_at = format!("\"index_at\": {}", part.index_at);
    let record_at = format!("\"at\": {}", part.record.unwrap().at);
    let forgeries = [
        (index_at.as_str(), "\"index_at\": 0".to_owned()),
        (&index_at, format!("\"index_at\": {}", part.index_at - 8)),
        (&index_at, format!("\"index_at\": {}", part.bytes)),
        (&index_at, format!("\"index_at\": {huge}")),
        ("\"runs\": 4", format!("\"runs\": {huge}")),
        ("\"runs\": 4", "\"runs\": 5".to_owned()),
        (&record_at, "\"at\": 0".to_owned()),
        (&record_at, format!("\"at\": {huge}")),
        (&format!("\"bytes\": {}", part.bytes), format!("\"bytes\": {huge}")),
        ("700\n", "699\n".to_owned()),
        ("700\n", format!("{huge}\n")),
        ("1024,", "8,".to_owned()),
    ];
    for (n, (from, to)) in forgeries.iter().enumerate() {
        let bad = dir.path().join(format!("{n}"));
        model::copy(&good, &bad);
        forge(&bad, "web1", "web1");
        assert_holds(&bad, &some_memory());
        forge(&bad, from, to);
        match whole(&bad) {
            // A machine with a page less, which no page of the bundle is.
            Ok(read) => assert!(*from == "700\n" && read.0 == some_memory(), "{from} {to}"),
            Err(e) => assert!(e.to_string().contains("is damaged"), "{from} {to}: {e}"),
        }
    }
}

/// A small file system of its own, unmounted when dropped.
struct Disk<'a>(&'a Path);

impl<'a> Disk<'a> {
    fn mount(at: &'a Path, options: &str) -> Option<Self> {
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(at).output();
        match mount {
            Ok(done) if done.status.success() => Some(Self(at)),
            other => {
                println!("SKIP: cannot mount a small disk: {other:?}");
                None
            }
        }
    }

    fn remount(&self, options: &str) {
        let done = Command::new("mount").args(["-o", options]).arg(self.0).status().unwrap();
        assert!(done.success());
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0).status();
    }
}

#[test]
fn a_full_disk_is_an_error_that_leaves_the_old_bundle_and_no_litter() {
    let dir = tempfile::tempdir().unwrap();
    let Some(_disk) = Disk::mount(dir.path(), "size=1m") else { return };
    let here = dir.path().join("b");
    let small: Memory = (0..40).map(|gfn| (gfn, page(gfn + 1, true))).collect();
    save(&here, &small, None).unwrap();
    let large: Memory = (0..600).map(|gfn| (gfn, page(gfn + 1, true))).collect();
    for target in [here.clone(), dir.path().join("new")] {
        let error = save(&target, &large, None).unwrap_err().to_string();
        assert!(error.contains("No space left") && error.contains("memory-"), "{error}");
    }
    assert_holds(&here, &small);
    assert_eq!(kinds(&here), ["manifest.json", "memory", "state"]);
    assert!(!dir.path().join("new").exists());
    // What a killed save left may be all that fills the disk.
    let left = here.join("memory-000000000000000000000000000000aa");
    std::fs::write(left, vec![1; 1 << 20]).unwrap_err();
    save(&here, &some_memory(), None).unwrap();
    assert_holds(&here, &some_memory());
}

#[test]
fn a_place_that_cannot_be_written_is_an_error_that_leaves_the_old_bundle() {
    let dir = tempfile::tempdir().unwrap();
    // Permissions do not bind root: a read-only file system does.
    let disk = Disk::mount(dir.path(), "size=4m");
    let here = dir.path().join("b");
    save(&here, &some_memory(), None).unwrap();
    match &disk {
        Some(disk) => disk.remount("remount,ro"),
        None => std::fs::set_permissions(&here, PermissionsExt::from_mode(0o500)).unwrap(),
    }
    let error = save(&here, &Memory::new(), None).unwrap_err().to_string();
    assert!(error.contains("cannot create") && error.contains(here.to_str().unwrap()), "{error}");
    assert_holds(&here, &some_memory());
    let missing = save(Path::new("/nowhere/at/all"), &Memory::new(), None).unwrap_err().to_string();
    assert!(missing.contains("/nowhere/at/all"), "{missing}");
}

#[test]
fn only_its_owner_reads_a_bundle() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path().join("b");
    save(&here, &some_memory(), None).unwrap();
    for path in [here.clone(), file(&here, "memory"), file(&here, "state"), file(&here, "manifest")]
    {
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{}", path.display());
    }
}
