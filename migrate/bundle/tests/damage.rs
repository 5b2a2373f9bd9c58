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
