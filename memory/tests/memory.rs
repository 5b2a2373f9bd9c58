//! Guest memory on real mappings: what is read and written where, and what exists afterwards.

#![expect(unsafe_code, reason = "views of mappings that the tests own")]

#[path = "host/huge_pages.rs"]
mod huge_pages;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use ferry_dirtylog::Region;
use ferry_memory::{
    Aside, Filler, GuestView, HUGE_PAGES, Mapping, MemoryError, Moved, Touched, resident,
};
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use huge_pages::HugePages;

/// Memory of both kinds, in two regions that touch and one behind a hole, and its view.
struct Machine {
    view: GuestView,
    // Behind the view: fields drop in order.
    _mappings: Vec<Mapping>,
}

const EXTENTS: [Run; 3] = [Run::new(16, 100), Run::new(116, 28), Run::new(200, 300)];

fn machines() -> Vec<Machine> {
    [false, true]
        .map(|shared| {
            let map = |pages| match shared {
                true => Mapping::memfd("test", pages).unwrap(),
                false => Mapping::anonymous(pages).unwrap(),
            };
            let mappings: Vec<_> = EXTENTS.iter().map(|e| map(e.pages)).collect();
            // Given in disorder.
            let regions: Vec<Region> =
                mappings.iter().zip(EXTENTS).rev().map(|(m, e)| m.region(e.start, 0)).collect();
            // SAFETY: the mappings outlive the view and nobody else knows of them.
            let view = unsafe { GuestView::new(regions) }.unwrap();
            Machine { view, _mappings: mappings }
        })
        .into()
}

fn page(value: u8) -> Vec<u8> {
    vec![value; PAGE_BYTES]
}

fn set(runs: &[Run]) -> PageSet {
    runs.iter().copied().collect()
}

#[test]
fn what_is_written_is_read_back_across_regions_that_touch() {
    for Machine { view, .. } in machines() {
        let data: Vec<u8> = (0..8 * PAGE_BYTES).map(|i| (i / 7 % 251).to_le_bytes()[0]).collect();
        view.write(112, &data).unwrap();
        let mut back = vec![0; data.len()];
        view.read(112, &mut back).unwrap();
        assert_eq!(back, data);
        let mut run = vec![9];
        view.read_run(Run::new(112, 8), &mut run).unwrap();
        assert_eq!(&run[1..], data);
        let mut part = [0; 5];
        view.read(115, &mut part).unwrap();
        assert_eq!(part, data[3 * PAGE_BYTES..][..5]);
    }
}

#[test]
fn frames_that_the_machine_does_not_have_are_refused_and_nothing_moves() {
    for Machine { view, .. } in machines() {
        let outside = |result| matches!(result, Err(MemoryError::Outside { .. }));
        for (gfn, pages) in
            [(15, 1), (15, 2), (143, 2), (144, 1), (143, 60), (499, 2), (u64::MAX, 1)]
        {
            let bytes = vec![7; pages * PAGE_BYTES];
            assert!(outside(view.write(gfn, &bytes)), "write {gfn}");
            assert!(outside(view.read(gfn, &mut bytes.clone())), "read {gfn}");
            let mut out = vec![1];
            let run = Run::new(gfn, pages as u64);
            assert!(outside(view.read_run(run, &mut out)) && out == [1], "run {gfn}");
            assert!(outside(view.discard(run)) && outside(view.prefault_write(run)), "{gfn}");
        }
        for run in [Run::new(16, u64::MAX), Run::new(16, u64::MAX / 4096 - 1), Run::new(0, 600)] {
            assert!(outside(view.read_run(run, &mut Vec::new())), "{run:?}");
            assert!(outside(view.discard(run)), "{run:?}");
        }
        assert!(view.resident().unwrap().is_empty());
    }
}

#[test]
fn overlapping_regions_are_refused() {
    let mapping = Mapping::anonymous(8).unwrap();
    // SAFETY: the mapping outlives the attempt.
    let view = unsafe { GuestView::new(vec![mapping.region(0, 0), mapping.region(7, 1)]) };
    assert!(matches!(view, Err(MemoryError::Overlap(..))));
}

#[test]
fn untouched_memory_is_not_resident_and_looking_does_not_change_that() {
    for Machine { view, .. } in machines() {
        assert!(view.resident().unwrap().is_empty());
        view.write(20, &page(1)).unwrap();
        view.write(143, &page(1)).unwrap();
        view.write(200, &page(2)).unwrap();
        view.write(201, &page(0)).unwrap();
        view.write(499, &page(3)).unwrap();
        let expected =
            set(&[Run::new(20, 1), Run::new(143, 1), Run::new(200, 2), Run::new(499, 1)]);
        assert_eq!(view.resident().unwrap(), expected);
        assert_eq!(resident(view.regions()).unwrap(), expected);
    }
}

#[test]
fn private_memory_that_was_only_read_is_not_resident() {
    let machine = machines().remove(0);
    machine.view.read(30, &mut page(1)).unwrap();
    assert!(machine.view.resident().unwrap().is_empty());
}

#[test]
fn discarded_pages_read_as_zeros_and_are_gone() {
    for Machine { view, .. } in machines() {
        view.write(110, &page(5).repeat(10)).unwrap();
        view.discard(Run::new(112, 6)).unwrap();
        assert_eq!(view.resident().unwrap(), set(&[Run::new(110, 2), Run::new(118, 2)]));
        let mut back = page(1).repeat(10);
        view.read(110, &mut back).unwrap();
        assert!(back[2 * PAGE_BYTES..8 * PAGE_BYTES].iter().all(|b| *b == 0));
        assert!(back[..2 * PAGE_BYTES].iter().chain(&back[8 * PAGE_BYTES..]).all(|b| *b == 5));
    }
}

#[test]
fn scattered_pages_that_are_discarded_together_read_as_zeros_and_all_others_stay() {
    for Machine { view, .. } in machines() {
        let all = Run::new(100, 44);
        view.write(all.start, &page(5).repeat(44)).unwrap();
        let gone: Vec<Run> = (0..8).map(|n| Run::new(100 + 5 * n, 1 + n % 3)).collect();
        view.discard_all(&set(&gone)).unwrap();
        let mut left = set(&[all]);
        left.subtract(&set(&gone));
        assert_eq!(view.resident().unwrap(), left);
        for gfn in all.start..all.end() {
            let mut back = page(1);
            view.read(gfn, &mut back).unwrap();
            assert_eq!(back[0], if left.contains(gfn) { 5 } else { 0 }, "page {gfn}");
        }
        view.discard_all(&PageSet::new()).unwrap();
        assert!(view.discard_all(&set(&[Run::new(1 << 40, 1)])).is_err());
    }
}

#[test]
fn prefaulted_pages_exist_and_keep_their_content() {
    for Machine { view, .. } in machines() {
        view.write(115, &page(5)).unwrap();
        view.prefault_write(Run::new(114, 4)).unwrap();
        assert_eq!(view.resident().unwrap(), set(&[Run::new(114, 4)]));
        let mut back = page(1);
        view.read(115, &mut back).unwrap();
        assert_eq!(back, page(5));
    }
}

#[test]
fn memory_that_cannot_be_had_is_an_error() {
    for pages in [u64::MAX, 1 << 45] {
        assert!(matches!(Mapping::anonymous(pages), Err(MemoryError::Map { .. })));
        assert!(matches!(Mapping::memfd("test", pages), Err(MemoryError::Map { .. })));
    }
}

/// Prints what finding the resident pages of 1 GiB costs (`--nocapture`), of which every other 2 MiB holds
/// data and every eighth page of the rest does.
#[test]
fn a_gibibyte_is_searched_and_every_page_found() {
    const GIB: u64 = 1 << 18;
    for shared in [false, true] {
        let mapping = if shared {
            Mapping::memfd("test", GIB).unwrap()
        } else {
            Mapping::anonymous(GIB).unwrap()
        };
        let region = mapping.region(0, 0);
        // SAFETY: the mapping outlives the view.
        let view = unsafe { GuestView::new(vec![region]) }.unwrap();
        let mut expected = PageSet::new();
        for at in (0..GIB / 4).step_by(1024) {
            expected.insert_run(Run::new(at, 512));
            expected.extend((at + 512..at + 1024).step_by(8).map(|gfn| Run::new(gfn, 1)));
        }
        for run in expected.runs() {
            view.prefault_write(run).unwrap();
        }
        let begin = Instant::now();
        let found = view.resident().unwrap();
        let kind = if shared { "memfd" } else { "private" };
        println!("resident, 1 GiB {kind}, {} pages: {:?}", found.len(), begin.elapsed());
        assert_eq!(found, expected);
    }
}

#[test]
fn memory_stays_mapped_as_long_as_a_view_keeps_it() {
    struct Owner(Mapping, Arc<AtomicBool>);
    impl Drop for Owner {
        fn drop(&mut self) {
            self.1.store(true, Ordering::SeqCst);
        }
    }
    let gone = Arc::new(AtomicBool::new(false));
    let mapping = Mapping::anonymous(4).unwrap();
    let region = mapping.region(0, 0);
    let owner = Owner(mapping, gone.clone());
    assert_eq!(owner.0.pages(), 4);
    // SAFETY: the view keeps the mapping, and nothing else uses it.
    let view = unsafe { GuestView::new(vec![region]) }.unwrap().keeping(owner);
    let clone = view.clone();
    drop(view);
    assert!(!gone.load(Ordering::SeqCst));
    clone.write(3, &[7; PAGE_BYTES]).unwrap();
    drop(clone);
    assert!(gone.load(Ordering::SeqCst));
}

#[test]
fn filling_makes_missing_pages_replaces_others_and_touches_no_more() {
    for Machine { view, .. } in machines() {
        view.write(113, &page(1)).unwrap();
        view.write(118, &page(2)).unwrap();
        let filler = Filler::new(view.clone());
        // Over what is there and what is not, in two regions that touch; then all of it again.
        for add in [3u8, 4] {
            let data: Vec<u8> = (0..8).flat_map(|i| page(add + i)).collect();
            filler.fill(112, &data).unwrap();
            let mut back = vec![0; data.len()];
            view.read(112, &mut back).unwrap();
            assert_eq!(back, data);
        }
        assert!(matches!(filler.fill(143, &[7; 2 * PAGE_BYTES]), Err(MemoryError::Outside { .. })));
        assert_eq!(view.resident().unwrap(), set(&[Run::new(112, 8)]));
        drop(filler);
        // Nobody fills a missing page any more, and nobody waits for it.
        view.write(300, &page(5)).unwrap();
        assert_eq!(view.resident().unwrap(), set(&[Run::new(112, 8), Run::new(300, 1)]));
    }
}

#[test]
fn one_set_bit_anywhere_is_seen_in_place() {
    for Machine { view, .. } in machines() {
        assert!(view.is_zero(200).unwrap());
        for at in (0..PAGE_BYTES).step_by(61).chain([PAGE_BYTES - 1]) {
            let mut bytes = page(0);
            bytes[at] = 1;
            view.write(200, &bytes).unwrap();
            assert!(!view.is_zero(200).unwrap(), "byte {at}");
        }
        view.write(200, &page(0)).unwrap();
        assert!(view.is_zero(200).unwrap());
        assert!(matches!(view.is_zero(150), Err(MemoryError::Outside { .. })));
    }
}

#[test]
fn what_is_read_or_written_of_shared_memory_is_touched_and_nothing_else() {
    for Machine { view, .. } in machines() {
        for run in [Run::new(20, 90), Run::new(200, 250)] {
            view.write(run.start, &page(7).repeat(usize::try_from(run.pages).unwrap())).unwrap();
        }
        let Some(look) = Touched::begin(&view).unwrap() else {
            assert!(view.regions().iter().all(|region| region.backing.is_none()));
            continue;
        };
        assert!(look.pages().unwrap().is_empty());
        let mut bytes = page(0);
        for gfn in [25, 300, 301] {
            view.read(gfn, &mut bytes).unwrap();
            assert_eq!(bytes, page(7), "what is there stays");
        }
        view.write(449, &page(8)).unwrap();
        let touched = look.pages().unwrap();
        for gfn in [25, 300, 301, 449] {
            assert!(touched.contains(gfn), "{gfn}: {touched:?}");
        }
        // The kernel maps pages around one that is read, if they exist.
        assert!(touched.len() < 64, "{touched:?}");
        assert!(!touched.contains(220) && !touched.contains(480), "{touched:?}");
    }
}

const HUGE_BYTES: u64 = 2 << 20;

#[test]
fn memory_in_huge_pages_is_read_written_filled_and_given_back_like_any_other() {
    let Some(_host) = HugePages::reserve(4 * HUGE_BYTES) else { return };
    let mapping = Mapping::huge(4 * HUGE_PAGES).unwrap();
    // SAFETY: the view keeps the mapping, and nothing else uses it.
    let view = unsafe { GuestView::new(vec![mapping.region(0, 0)]) }.unwrap().keeping(mapping);
    assert!(view.resident().unwrap().is_empty(), "nothing is populated");
    view.write(520, &page(1)).unwrap();
    let filler = Filler::new(view.clone());
    filler.fill(1030, &page(2).repeat(3)).unwrap();
    drop(filler);
    assert_eq!(view.resident().unwrap(), set(&[Run::new(512, 1024)]), "whole huge pages");
    assert!(Touched::begin(&view).unwrap().is_none(), "it would forget what is resident");
    view.discard(Run::new(519, 2)).unwrap();
    view.discard(Run::new(1024, 512)).unwrap();
    assert_eq!(view.resident().unwrap(), set(&[Run::new(512, 512)]));
    for (gfn, value) in [(520, 0), (519, 0), (1030, 0)] {
        let mut back = page(9);
        view.read(gfn, &mut back).unwrap();
        assert_eq!(back, page(value), "frame {gfn}");
    }
}

#[test]
fn private_memory_is_never_dropped_to_look_at_it_whatever_a_region_says() {
    let mapping = Mapping::anonymous(16).unwrap();
    let file = Mapping::memfd("test", 16).unwrap();
    // A region that calls private memory shared.
    let region = Region { backing: file.region(0, 0).backing, ..mapping.region(0, 0) };
    // SAFETY: the mappings outlive the view, which nothing else uses.
    let view = unsafe { GuestView::new(vec![region]) }.unwrap();
    view.write(3, &page(9)).unwrap();
    assert!(Touched::begin(&view).unwrap().is_none());
    let mut back = page(0);
    view.read(3, &mut back).unwrap();
    assert_eq!(back, page(9));
}

#[test]
fn too_few_huge_pages_are_an_error_that_says_how_many_there_are_and_what_to_do() {
    let Some(_host) = HugePages::reserve(2 * HUGE_BYTES) else { return };
    // More than any host of these tests has.
    let e = Mapping::huge(HUGE_PAGES << 20).unwrap_err();
    let MemoryError::HugePages { needed, free, enough, .. } = &e else { panic!("{e}") };
    assert_eq!(*needed, 1 << 20);
    assert!(*free >= 2 && *enough >= 1 << 20, "{e}");
    let words = e.to_string();
    for word in ["1048576", &format!("{free} are free"), &format!("vm.nr_hugepages={enough}")] {
        assert!(words.contains(word), "{words}");
    }
    let odd = Mapping::huge(HUGE_PAGES + 1).unwrap_err().to_string();
    assert!(odd.contains("513 pages") && odd.contains("multiple of 2 MiB"), "{odd}");
}

/// Linux 6.18 refuses some of these moves after it made them: a page is lost where that is believed.
#[test]
fn a_page_that_is_written_just_as_it_is_moved_aside_is_in_one_place() {
    const PAGES: u64 = 4096;
    let mapping = Mapping::anonymous(PAGES).unwrap();
    let region = mapping.region(0, 0);
    let view = GuestView::of(vec![(0, mapping)]).unwrap();
    let aside = Aside::new(1).unwrap();
    // Shared pages of zeros: the first write changes their entries.
    view.read_run(Run::new(0, PAGES), &mut Vec::new()).unwrap();
    let (turn, done) = (AtomicU64::new(0), AtomicU64::new(0));
    let mut wrong = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for gfn in 0..PAGES {
                while turn.load(Ordering::Acquire) <= gfn {
                    std::hint::spin_loop();
                }
                view.write(gfn, &[7]).unwrap();
                done.store(gfn + 1, Ordering::Release);
            }
        });
        for gfn in 0..PAGES {
            turn.store(gfn + 1, Ordering::Release);
            // From well before the write to well after it.
            (0..gfn % 512).for_each(|_| std::hint::spin_loop());
            let moved = aside.take(&region, gfn, 0);
            while done.load(Ordering::Acquire) <= gfn {
                std::hint::spin_loop();
            }
            let (mut slot, mut there) = ([0], [0]);
            if let Ok(Moved::Yes) = moved {
                aside.read(0, &mut slot).unwrap();
            }
            view.read(gfn, &mut there).unwrap();
            if moved.is_err() || slot[0] + there[0] != 7 {
                wrong.push((gfn, moved, slot[0], there[0]));
            }
            aside.clear(1).unwrap();
        }
    });
    assert!(wrong.is_empty(), "{} of {PAGES}: {:?}", wrong.len(), wrong.first());
}
