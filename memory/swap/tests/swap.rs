//! Machines of plain memory and threads, whose pages come and go.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ferry_memory::{GuestView, Mapping, resident};
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use ferry_swap::{Figures, Options, Swap};

const PAGE: u64 = PAGE_BYTES as u64;

/// Memory whose pages are reached by address, as a guest does.
struct Machine {
    view: GuestView,
    host: usize,
    pages: u64,
}

impl Machine {
    fn new(pages: u64) -> Self {
        Self::of(Mapping::anonymous(pages).unwrap())
    }

    /// In memory that others could map, too.
    fn shared(pages: u64) -> Self {
        Self::of(Mapping::memfd("guest", pages).unwrap())
    }

    fn of(mapping: Mapping) -> Self {
        let pages = mapping.pages();
        let host = mapping.host();
        Self { view: GuestView::of(vec![(0, mapping)]).unwrap(), host, pages }
    }

    #[expect(unsafe_code, reason = "a guest reaches its memory by address")]
    fn word(&self, gfn: u64, word: usize) -> &AtomicU64 {
        assert!(gfn < self.pages && word < PAGE_BYTES / 8);
        let at = self.host + usize::try_from(gfn).unwrap() * PAGE_BYTES + word * 8;
        // SAFETY: inside the mapping, which the view keeps; every access to it is atomic or a copy by the kernel.
        unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(at) }
    }

    /// Content that is half a pattern of its own, half noise.
    fn write(&self, gfn: u64, version: u64) {
        let mut x = gfn << 32 | version;
        for word in 0..PAGE_BYTES / 8 {
            if word % 2 == 0 {
                x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1442);
            }
            let value = if version == 0 {
                0
            } else if word == 0 {
                version
            } else {
                x
            };
            self.word(gfn, word).store(value, Ordering::Relaxed);
        }
    }

    fn check(&self, gfn: u64, version: u64) {
        let mut x = gfn << 32 | version;
        for word in 0..PAGE_BYTES / 8 {
            if word % 2 == 0 {
                x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1442);
            }
            let expected = if version == 0 {
                0
            } else if word == 0 {
                version
            } else {
                x
            };
            let found = self.word(gfn, word).load(Ordering::Relaxed);
            assert_eq!(found, expected, "page {gfn}, version {version}, word {word}");
        }
    }

    fn in_memory(&self) -> u64 {
        resident(self.view.regions()).unwrap().len()
    }
}

fn pool(pool_bytes: u64) -> Options {
    Options { pool_bytes, dir: None, file_bytes: 0 }
}

fn until(what: &str, swap: &Swap, done: impl Fn(&Figures) -> bool) -> Figures {
    let begin = Instant::now();
    loop {
        let figures = swap.figures();
        if done(&figures) {
            return figures;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{what}: {figures:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn pages_that_come_and_go_are_never_wrong() {
    come_and_go(&Machine::new(8192));
}

#[test]
fn pages_of_shared_memory_come_and_go_as_well() {
    come_and_go(&Machine::shared(8192));
}

fn come_and_go(machine: &Machine) {
    let dir = tempfile::tempdir().unwrap();
    let options =
        Options { pool_bytes: 4 << 20, dir: Some(dir.path().into()), file_bytes: 64 << 20 };
    let swap = Swap::new(&machine.view, &options).unwrap();
    swap.set_limit(Some(12 << 20)).unwrap();
    let end = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for part in 0..2 {
            let end = &end;
            scope.spawn(move || {
                let mut versions = vec![0; 4096];
                let mut x = part + 1u64;
                while !end.load(Ordering::Relaxed) {
                    x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    // Rows, a small set, and all of it.
                    let first = match x >> 62 {
                        0 => x >> 20 & 4095,
                        _ => x >> 20 & 255,
                    };
                    let pages = if x >> 60 & 3 == 0 { 20 } else { 1 };
                    for page in first..(first + pages).min(4096) {
                        let gfn = part * 4096 + page;
                        let version = &mut versions[usize::try_from(page).unwrap()];
                        machine.check(gfn, *version);
                        if x >> 50 & 1 == 0 {
                            *version += 1;
                            machine.write(gfn, *version);
                        }
                    }
                }
                for (page, version) in versions.iter().enumerate() {
                    machine.check(part * 4096 + page as u64, *version);
                }
            });
        }
        std::thread::sleep(Duration::from_secs(3));
        end.store(true, Ordering::Relaxed);
    });
    let figures = swap.figures();
    println!("{figures:?}");
    assert!(figures.pages_out > 1000 && figures.pages_in > 1000, "{figures:?}");
    assert!(figures.file_bytes > 0 && figures.trouble.is_none(), "{figures:?}");
    let figures = until("the limit is kept", &swap, |f| {
        machine.in_memory() * PAGE + f.pool_bytes <= 12 << 20
    });
    assert!(figures.swapped_bytes > 0);
}

#[test]
fn looking_at_pages_that_are_away_does_not_bring_them_back() {
    looks(&Machine::new(1024));
    looks(&Machine::shared(1024));
}

fn looks(machine: &Machine) {
    for gfn in 0..1024 {
        machine.write(gfn, if gfn % 4 == 0 { 0 } else { 1 });
    }
    let all = machine.view.resident().unwrap();
    let swap = Swap::new(&machine.view, &pool(16 << 20)).unwrap();
    swap.set_limit(Some(0)).unwrap();
    until("all are away", &swap, |_| machine.in_memory() == 0);
    let (mut bytes, held) = (Vec::new(), machine.view.resident().unwrap());
    held.runs().for_each(|run| machine.view.read_run(run, &mut bytes).unwrap());
    assert_eq!(machine.in_memory(), 0);
    assert_eq!(swap.figures().pages_in, 0);
    assert!(!machine.view.is_zero(1).unwrap());
    // Those of zeros are nowhere any more.
    assert_eq!((all.len(), machine.view.resident().unwrap().len()), (1024, 768));
    assert_eq!(swap.figures().zero_pages, 256);
    swap.set_limit(None).unwrap();
    (0..1024).for_each(|gfn| machine.check(gfn, if gfn % 4 == 0 { 0 } else { 1 }));
    let pages = held.runs().flat_map(|run| run.start..run.end());
    for (gfn, page) in pages.zip(bytes.chunks(PAGE_BYTES)) {
        let word = u64::from_le_bytes(page[8..16].try_into().unwrap());
        assert_eq!(word, machine.word(gfn, 1).load(Ordering::Relaxed));
    }
}

#[test]
fn a_page_that_is_given_back_while_it_is_away_reads_as_zeros() {
    gives_back(&Machine::new(256));
    gives_back(&Machine::shared(256));
}

fn gives_back(machine: &Machine) {
    (0..256).for_each(|gfn| machine.write(gfn, 1));
    let swap = Swap::new(&machine.view, &pool(4 << 20)).unwrap();
    swap.set_limit(Some(0)).unwrap();
    until("all are away", &swap, |_| machine.in_memory() == 0);
    machine.view.discard(Run::new(10, 100)).unwrap();
    machine.view.write(200, &[7; PAGE_BYTES]).unwrap();
    swap.set_limit(None).unwrap();
    for gfn in 0..256u64 {
        match gfn {
            10..110 => machine.check(gfn, 0),
            200 => assert_eq!(machine.word(gfn, 9).load(Ordering::Relaxed), 0x0707_0707_0707_0707),
            _ => machine.check(gfn, 1),
        }
    }
}

/// Without the swap's word for them, writes to pages that are moved out before anybody looked are lost.
#[test]
fn a_write_is_reported_though_its_page_is_moved_out_before_anybody_looks() {
    reports_writes(&Machine::new(256));
    reports_writes(&Machine::shared(256));
}

fn reports_writes(machine: &Machine) {
    (0..256).for_each(|gfn| machine.write(gfn, 1));
    let swap = Swap::new(&machine.view, &pool(4 << 20)).unwrap();
    swap.set_limit(Some(1 << 20)).unwrap();
    let mut tracker = machine.view.away().unwrap().tracker().unwrap();
    tracker.start().unwrap();
    tracker.collect(&mut PageSet::new()).unwrap();
    (0..100).for_each(|gfn| machine.write(gfn, 2));
    swap.set_limit(Some(0)).unwrap();
    until("all are away", &swap, |_| machine.in_memory() == 0);
    let mut written = PageSet::new();
    tracker.collect(&mut written).unwrap();
    assert_eq!(written.count_in(Run::new(0, 100)), 100);
    swap.set_limit(None).unwrap();
    // Those that come back clean need not be named again; those that are written then must.
    (0..256).for_each(|gfn| machine.check(gfn, if gfn < 100 { 2 } else { 1 }));
    tracker.collect(&mut PageSet::new()).unwrap();
    machine.write(50, 3);
    let mut written = PageSet::new();
    tracker.collect(&mut written).unwrap();
    assert!(written.contains(50) && written.len() == 1, "{written:?}");
    tracker.stop().unwrap();
}

#[test]
fn equal_pages_are_kept_once() {
    let machine = Machine::new(512);
    for gfn in 0..512 {
        for word in 0..PAGE_BYTES / 8 {
            let mixed = (word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            machine.word(gfn, word).store(mixed, Ordering::Relaxed);
        }
    }
    let swap = Swap::new(&machine.view, &pool(4 << 20)).unwrap();
    swap.set_limit(Some(0)).unwrap();
    let figures = until("all are away", &swap, |f| f.swapped_bytes == 512 * PAGE);
    assert_eq!(figures.shared_bytes, 511 * PAGE);
    assert_eq!(figures.pool_bytes, 64 << 10);
}

#[test]
fn a_pool_at_its_bound_leaves_pages_in_memory_and_says_so() {
    let machine = Machine::new(1024);
    (0..1024).for_each(|gfn| machine.write(gfn, 1));
    let swap = Swap::new(&machine.view, &pool(256 << 10)).unwrap();
    swap.set_limit(Some(0)).unwrap();
    let figures = until("it is full", &swap, |f| f.trouble.is_some());
    assert!(figures.trouble.unwrap().contains("the swap pool is full"));
    assert!(machine.in_memory() > 800);
    (0..1024).for_each(|gfn| machine.check(gfn, 1));
}

/// The file of this process's swap in `dir`, by which others do not get at it but this test.
fn swap_file(dir: &std::path::Path) -> std::fs::File {
    let dir = dir.to_str().unwrap().to_owned();
    let mut files = std::fs::read_dir("/proc/self/fd").unwrap().flatten().filter(|entry| {
        std::fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with(&dir))
    });
    let path = files.next().unwrap().path();
    std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap()
}

#[test]
fn a_page_that_the_file_lost_is_waited_for_and_never_seen_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Arc::new(Machine::new(2048));
    (0..2048).for_each(|gfn| machine.write(gfn, 1));
    let options =
        Options { pool_bytes: 512 << 10, dir: Some(dir.path().into()), file_bytes: 16 << 20 };
    let swap = Swap::new(&machine.view, &options).unwrap();
    // It has no name that others could delete or cut.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    swap.set_limit(Some(0)).unwrap();
    until("all are in the file", &swap, |f| machine.in_memory() == 0 && f.pool_bytes == 0);
    swap.set_limit(None).unwrap();
    let file = swap_file(dir.path());
    let mut content = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut content, 0).unwrap();
    file.set_len(0).unwrap();
    let right = Arc::new(Mutex::new(0));
    let guest = {
        let (machine, right) = (machine.clone(), right.clone());
        std::thread::spawn(move || {
            for gfn in 0..2048 {
                machine.check(gfn, 1);
                *right.lock().unwrap() += 1;
            }
        })
    };
    let figures = until("it is told", &swap, |f| f.trouble.is_some());
    let trouble = figures.trouble.unwrap();
    assert!(trouble.contains("cannot be read from the swap file"), "{trouble}");
    assert!(!guest.is_finished());
    // Other content is as bad as none.
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![1; content.len()], 0).unwrap();
    until("it is told", &swap, |f| f.trouble.as_ref().is_some_and(|why| *why != trouble));
    assert!(!guest.is_finished());
    // When it is back, all goes on.
    std::os::unix::fs::FileExt::write_all_at(&file, &content, 0).unwrap();
    guest.join().unwrap();
    assert_eq!(*right.lock().unwrap(), 2048);
}

#[test]
fn a_file_is_used_again_and_again() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::new(2048);
    (0..2048).for_each(|gfn| machine.write(gfn, 1));
    // Twice what is needed at a time, so that segments must be cleared of what is old.
    let options =
        Options { pool_bytes: 512 << 10, dir: Some(dir.path().into()), file_bytes: 8 << 20 };
    let swap = Swap::new(&machine.view, &options).unwrap();
    for version in 1..12 {
        swap.set_limit(Some(0)).unwrap();
        until("all are away", &swap, |_| machine.in_memory() == 0);
        swap.set_limit(None).unwrap();
        for gfn in 0..2048 {
            // Some stay where they are for good.
            if gfn % 7 != 0 {
                machine.check(gfn, version);
                machine.write(gfn, version + 1);
            }
        }
    }
    (0..2048).for_each(|gfn| machine.check(gfn, if gfn % 7 == 0 { 1 } else { 12 }));
    assert!(swap.figures().trouble.is_none());
}

#[test]
fn what_cannot_be_is_refused_with_what_to_do() {
    let machine = Machine::new(16);
    let dir = tempfile::tempdir().unwrap();
    let gone = dir.path().join("gone");
    for (options, word) in [
        (pool(0), "the pool needs at least"),
        (Options { file_bytes: 4 << 20, ..pool(1 << 20) }, "a directory"),
        (Options { dir: Some(gone.clone()), file_bytes: 4096, ..pool(1 << 20) }, "at least"),
        (Options { dir: Some(gone), file_bytes: 4 << 20, ..pool(1 << 20) }, "choose a directory"),
    ] {
        let e = Swap::new(&machine.view, &options).unwrap_err().to_string();
        assert!(e.contains(word), "{e}");
    }
    let Ok(huge) = Mapping::huge(512) else {
        return println!("SKIP: no huge page is reserved here");
    };
    let huge = GuestView::of(vec![(0, huge)]).unwrap();
    let e = Swap::new(&huge, &pool(1 << 20)).unwrap_err();
    let cause = std::error::Error::source(&e).unwrap().to_string();
    assert!(cause.contains("in huge pages"), "{cause}");
}

#[test]
fn memory_that_is_touched_in_a_row_is_not_waited_for_page_by_page_and_takes_no_more() {
    let machine = Machine::new(4096);
    let swap = Swap::new(&machine.view, &pool(4 << 20)).unwrap();
    swap.set_limit(Some(32 << 20)).unwrap();
    (0..1000).for_each(|gfn| machine.write(gfn, 1));
    assert!(swap.figures().first_touches < 100, "{:?}", swap.figures());
    assert_eq!(machine.view.resident().unwrap().len(), 1000);
    (0..4096).for_each(|gfn| machine.check(gfn, u64::from(gfn < 1000)));
    assert_eq!(machine.view.resident().unwrap().len(), 1000);
}

/// A small disk; it goes when this does.
struct Disk<'a>(&'a std::path::Path);

impl<'a> Disk<'a> {
    fn mount(at: &'a std::path::Path, options: &str) -> Option<Self> {
        let mut mount = std::process::Command::new("mount");
        match mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(at).output() {
            Ok(done) if done.status.success() => Some(Self(at)),
            other => {
                println!("SKIP: cannot mount a small disk: {other:?}");
                None
            }
        }
    }

    fn remount(&self, options: &str) {
        let mut mount = std::process::Command::new("mount");
        assert!(mount.args(["-o", options]).arg(self.0).status().unwrap().success());
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("--lazy").arg(self.0).status();
    }
}

#[test]
fn pages_stay_in_the_pool_while_the_disk_is_full_and_go_on_when_it_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(dir.path(), "size=1m") else { return };
    let machine = Machine::new(4096);
    (0..4096).for_each(|gfn| machine.write(gfn, 1));
    let options =
        Options { pool_bytes: 1 << 20, dir: Some(dir.path().into()), file_bytes: 64 << 20 };
    let swap = Swap::new(&machine.view, &options).unwrap();
    swap.set_limit(Some(0)).unwrap();
    let figures = until("it is told", &swap, |f| f.trouble.is_some());
    let trouble = figures.trouble.unwrap();
    assert!(trouble.contains("cannot be written") && trouble.contains("No space"), "{trouble}");
    assert!(machine.in_memory() > 2048);
    // Meanwhile all is right.
    (0..4096).step_by(3).for_each(|gfn| machine.check(gfn, 1));
    disk.remount("remount,size=64m");
    let figures = until("all are away", &swap, |f| f.swapped_bytes == 4096 * PAGE);
    assert_eq!(figures.trouble, None);
    swap.set_limit(None).unwrap();
    (0..4096).for_each(|gfn| machine.check(gfn, 1));
}

#[test]
fn pages_of_zeros_are_given_back_without_need_and_no_write_to_them_is_lost() {
    let machine = Machine::new(4096);
    (0..4096).for_each(|gfn| machine.write(gfn, 0));
    assert_eq!(machine.in_memory(), 4096);
    let swap = Swap::new(&machine.view, &pool(4 << 20)).unwrap();
    swap.set_limit(None).unwrap();
    let all: PageSet = [Run::new(0, 4096)].into_iter().collect();
    let end = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let (mut versions, mut x) = (vec![0; 4096], 1u64);
            while !end.load(Ordering::Relaxed) {
                x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let gfn = x >> 40 & 4095;
                let version = &mut versions[usize::try_from(gfn).unwrap()];
                machine.check(gfn, *version);
                // Half of them become zeros again.
                *version = if *version > 0 { 0 } else { x >> 50 };
                machine.write(gfn, *version);
            }
            versions
        });
        until("zeros are given back again and again", &swap, |figures| {
            swap.give_back_zeros(&all).unwrap();
            std::thread::sleep(Duration::from_millis(50));
            figures.zero_pages > 4000
        });
        end.store(true, Ordering::Relaxed);
        writer.join().unwrap()
    });
    let figures = swap.figures();
    assert_eq!(figures.trouble, None);
    // Nothing asked for more.
    assert_eq!((figures.pages_out, figures.swapped_bytes), (figures.zero_pages, 0), "{figures:?}");
    for (gfn, version) in (0..).zip(&written) {
        machine.check(gfn, *version);
    }
    swap.give_back_zeros(&all).unwrap();
    // Looking at a page of zeros that was given back takes no memory.
    let data = written.iter().filter(|version| **version > 0).count() as u64;
    until("all zeros are given back", &swap, |_| machine.in_memory() == data);
    let elsewhere: PageSet = [Run::new(1 << 40, 5)].into_iter().collect();
    swap.give_back_zeros(&elsewhere).unwrap();
    swap.prefer(&elsewhere);
}

#[test]
fn preferred_pages_go_first() {
    let machine = Machine::new(2048);
    (0..2048).for_each(|gfn| machine.write(gfn, 1));
    let swap = Swap::new(&machine.view, &pool(16 << 20)).unwrap();
    swap.set_limit(Some(2048 * PAGE)).unwrap();
    // A look later all are cold, and would go from the first on.
    std::thread::sleep(Duration::from_millis(2500));
    let preferred = Run::new(1500, 400);
    swap.prefer(&[preferred].into_iter().collect());
    swap.set_limit(Some((2048 - 200) * PAGE)).unwrap();
    until("the limit is kept", &swap, |f| {
        machine.in_memory() * PAGE + f.pool_bytes <= (2048 - 200) * PAGE
    });
    let mut away = machine.view.away().unwrap().pages();
    let all = away.len();
    away.remove_run(preferred);
    // Some go to see whether they come back, and a few before the limit asks for it.
    assert!(all > 200 && away.len() <= 3 * 64 + 2048 / 64, "{} of {all}", away.len());
    (0..2048).for_each(|gfn| machine.check(gfn, 1));
}

#[test]
fn a_tracker_is_told_what_the_swap_found_written() {
    let machine = Machine::new(256);
    (0..256).for_each(|gfn| machine.write(gfn, 1));
    let swap = Swap::new(&machine.view, &pool(4 << 20)).unwrap();
    swap.set_limit(Some(2 << 20)).unwrap();
    let mut tracker = machine.view.away().unwrap().tracker().unwrap();
    tracker.start().unwrap();
    tracker.collect(&mut PageSet::new()).unwrap();
    machine.write(50, 2);
    // The swap looks at its memory every second.
    std::thread::sleep(Duration::from_millis(2500));
    machine.write(60, 2);
    let mut written = PageSet::new();
    tracker.collect(&mut written).unwrap();
    assert!(written.contains(50) && written.contains(60), "{written:?}");
}

#[test]
fn a_disk_that_is_full_at_the_files_last_segment_is_told_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(dir.path(), "size=1m") else { return };
    let machine = Machine::new(4096);
    (0..4096).for_each(|gfn| machine.write(gfn, 1));
    // As many segments as the disk has room for, and the one that is kept free.
    let options =
        Options { pool_bytes: 512 << 10, dir: Some(dir.path().into()), file_bytes: 5 << 18 };
    let swap = Swap::new(&machine.view, &options).unwrap();
    swap.set_limit(Some(0)).unwrap();
    until("it is told", &swap, |f| f.trouble.is_some());
    // Much of it is of use no more: there is room again if segments are put together.
    machine.view.discard(Run::new(0, 2048)).unwrap();
    disk.remount("remount,size=8m");
    (2048..4096).for_each(|gfn| machine.check(gfn, 1));
    (2048..4096).for_each(|gfn| machine.write(gfn, 2));
    (2048..4096).for_each(|gfn| machine.check(gfn, 2));
}

#[test]
fn what_is_in_hand_when_memory_is_let_go_is_put_back_and_nobody_waits() {
    let machine = Machine::new(1024);
    (0..1024).for_each(|gfn| machine.write(gfn, 1));
    let swap = Swap::new(&machine.view, &pool(128 << 10)).unwrap();
    swap.set_limit(Some(0)).unwrap();
    until("it is full", &swap, |f| f.trouble.is_some());
    let away = machine.view.away().unwrap().pages();
    swap.abandon();
    assert!(swap.set_limit(Some(0)).unwrap_err().to_string().contains("given up"));
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        let figures = swap.figures();
        for gfn in (0..1024).filter(|gfn| !away.contains(*gfn)) {
            // Moved out before it was let go, perhaps: those are lost with the machine, as was said.
            if !machine.view.away().unwrap().has(gfn) {
                machine.check(gfn, 1);
            }
        }
        drop((swap, machine));
        done.send(figures).unwrap();
    });
    is_done.recv_timeout(Duration::from_secs(30)).expect("it ends");
}

#[test]
fn the_pool_goes_to_the_file_where_it_takes_too_much_of_the_limit() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::new(4096);
    (0..4096).for_each(|gfn| machine.write(gfn, 1));
    let options =
        Options { pool_bytes: 64 << 20, dir: Some(dir.path().into()), file_bytes: 64 << 20 };
    let swap = Swap::new(&machine.view, &options).unwrap();
    // All of it compressed is more than twice that.
    swap.set_limit(Some(2 << 20)).unwrap();
    until("the limit is kept", &swap, |f| machine.in_memory() * PAGE + f.pool_bytes <= 2 << 20);
    swap.set_limit(None).unwrap();
    (0..4096).for_each(|gfn| machine.check(gfn, 1));
}

#[test]
fn a_machine_has_one_swap() {
    let machine = Machine::new(16);
    let _swap = Swap::new(&machine.view, &pool(1 << 20)).unwrap();
    let e = Swap::new(&machine.view, &pool(1 << 20)).unwrap_err().to_string();
    assert!(e.contains("has a swap already"), "{e}");
}
