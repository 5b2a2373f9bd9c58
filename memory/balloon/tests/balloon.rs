//! What a driver gets of the balloon that keeps to the specification.

#![expect(unsafe_code, reason = "memory of a machine, by its address")]

mod driver;
#[path = "../../tests/host/huge_pages.rs"]
mod huge_pages;

use driver::{Desc, FIRST_FREE, Guest, HIGH, PAGE, free, ring, set};
use ferry_balloon::{
    Balloon, DEFLATE, HINTS, INFLATE, Interrupt, REPORTS, Refused, STATISTICS, feature,
};
use ferry_pages::{PageSet, Run};
use huge_pages::HugePages;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

const USED: Option<Interrupt> = Some(Interrupt::UsedBuffers);
const MACHINE_BYTES: u64 = (4096 + 1024) * PAGE;

fn config_word(balloon: &Balloon, word: u64) -> u32 {
    let mut bytes = [0; 4];
    balloon.read_config(word * 4, &mut bytes);
    u32::from_le_bytes(bytes)
}

#[test]
fn a_page_in_the_balloon_is_the_hosts_and_comes_back_as_zeros() {
    let mut guest = Guest::new();
    let (upwards, downwards, high) =
        (Run::new(FIRST_FREE, 300), Run::new(2000, 50), Run::new(HIGH.start, 7));
    for run in [upwards, downwards, high] {
        guest.touch(run);
    }
    let lists = [
        guest.list(upwards.start..upwards.end()),
        guest.list((downwards.start..downwards.end()).rev()),
        guest.list([3, 6, 0, 5, 1, 4, 2].map(|n| HIGH.start + n)),
    ];
    assert_eq!(guest.send(INFLATE, &lists), USED);
    assert_eq!(guest.used(INFLATE), 1);
    for run in [upwards, downwards, high] {
        assert_eq!(guest.resident(run), 0, "{run:?}");
    }
    assert_eq!(*guest.ballooned(), set(&[upwards, downwards, high]));
    assert_eq!(guest.balloon.status().ballooned_bytes, 357 * PAGE);

    let back = guest.list(upwards.start..upwards.end());
    assert_eq!(guest.send(DEFLATE, &[back]), USED);
    assert_eq!(*guest.ballooned(), set(&[downwards, high]));
    let mut page = [1; ferry_pages::PAGE_BYTES];
    guest.view.read(upwards.start + 9, &mut page).unwrap();
    assert_eq!(page, [0; ferry_pages::PAGE_BYTES]);
    assert_eq!(guest.balloon.status().troubles, 0, "{}", guest.last_trouble());
}

#[test]
fn a_huge_page_is_given_back_when_all_of_it_is_in_the_balloon_and_not_before() {
    let Some(_huge) = HugePages::reserve(MACHINE_BYTES) else { return };
    let mut guest = Guest::unstarted(true);
    guest.start(feature::OFFERED & !feature::PAGE_POISON);
    let unit = Run::new(1024, 512);
    let inflate = |guest: &mut Guest, from: u64, to: u64| {
        let list = guest.list(from..to);
        assert_eq!(guest.send(INFLATE, &[list]), USED);
        guest.resident(unit)
    };
    guest.touch(Run::new(1024, 1));
    assert_eq!(guest.resident(unit), 512);
    assert_eq!(inflate(&mut guest, 1024, 1400), 512, "some of it");
    assert_eq!(inflate(&mut guest, 1400, 1535), 512, "all but one page");
    assert_eq!(inflate(&mut guest, 1535, 1600), 0, "all of it, and some of the next");

    // It is used again, in part, and once more given back.
    let list = guest.list([1100]);
    assert_eq!(guest.send(DEFLATE, &[list]), USED);
    guest.touch(Run::new(1100, 1));
    assert_eq!(guest.resident(unit), 512);
    assert_eq!(inflate(&mut guest, 1100, 1101), 0);

    // A report counts for itself: half of a huge page is nothing to give back.
    let next = Run::new(2048, 512);
    guest.touch(Run::new(2048, 1));
    let half = u32::try_from(256 * PAGE).unwrap();
    assert_eq!(guest.send(REPORTS, &[free(next.start * PAGE, half)]), USED);
    assert_eq!(guest.resident(next), 512);
    let halves = [free(next.start * PAGE, half), free((next.start + 256) * PAGE, half)];
    assert_eq!(guest.send(REPORTS, &halves), USED);
    assert_eq!(guest.resident(next), 0);
    assert_eq!(guest.balloon.status().reported_bytes, 512 * PAGE);
    assert_eq!(guest.balloon.status().troubles, 0, "{}", guest.last_trouble());
}

#[test]
fn only_whole_pages_of_a_report_are_given_back() {
    // Start and length in bytes, from page FIRST_FREE on; pages that go.
    let cases: &[(u64, u32, &[u64])] = &[
        (0, 4096, &[0]),
        (0, 4095, &[]),
        (1, 4096, &[]),
        (1, 8191, &[1]),
        (4095, 4098, &[1]),
        (100, 3 * 4096, &[1, 2]),
        (0, 0, &[]),
    ];
    for &(at, bytes, gone) in cases {
        let mut guest = Guest::new();
        guest.touch(Run::new(FIRST_FREE, 4));
        assert_eq!(guest.send(REPORTS, &[free(FIRST_FREE * PAGE + at, bytes)]), USED);
        let resident = guest.view.resident().unwrap();
        for n in 0..4 {
            assert_eq!(resident.contains(FIRST_FREE + n), !gone.contains(&n), "{at}+{bytes}: {n}");
        }
        assert_eq!(guest.balloon.status().reported_bytes, gone.len() as u64 * PAGE);
        assert!(guest.ballooned().is_empty());
        assert_eq!(guest.balloon.status().troubles, 0);
    }
}

#[test]
fn pages_that_the_guest_poisons_are_neither_given_back_by_a_report_nor_taken_for_a_hint() {
    // Features, poison, and whether free pages are free to the host.
    let none = feature::OFFERED & !feature::PAGE_POISON;
    for (features, poison, free_to_the_host) in [
        (feature::OFFERED, 0, true),
        (feature::OFFERED, 0xaaaa_aaaa_u32, false),
        // Written, but never agreed on.
        (none, 0xaaaa_aaaa, true),
    ] {
        let mut guest = Guest::unstarted(false);
        guest.balloon.write_config(12, &poison.to_le_bytes());
        guest.start(features);
        let run = Run::new(FIRST_FREE, 8);
        guest.touch(run);
        assert_eq!(guest.send(REPORTS, &[free(run.start * PAGE, 8 * 4096)]), USED);
        assert_eq!(guest.resident(run) == 0, free_to_the_host);
        assert_eq!(guest.balloon.status().reported_bytes > 0, free_to_the_host);
        match guest.balloon.hint_begin() {
            Ok(interrupt) => assert_eq!(interrupt, Interrupt::Configuration),
            Err(e) => assert_eq!(e, Refused::Poisoned(poison)),
        }
        let id = config_word(&guest.balloon, 2);
        let command = guest.buffer(&id.to_le_bytes());
        let command = Desc { at: command, bytes: 4, flags: 0, next: 0 };
        let _ = guest.send(HINTS, &[command, free(run.start * PAGE, 8 * 4096)]);
        let mut hints = PageSet::new();
        guest.balloon.take_hints(&mut hints);
        assert_eq!(!hints.is_empty(), free_to_the_host);
    }
}

#[test]
fn poison_that_comes_after_hints_were_asked_for_counts_as_well() {
    let mut guest = Guest::unstarted(false);
    guest.start(feature::OFFERED);
    let _ = guest.balloon.hint_begin().unwrap();
    let at = guest.buffer(&config_word(&guest.balloon, 2).to_le_bytes());
    let page = free(FIRST_FREE * PAGE, 4096);
    for (poison, hinted) in [(1u32, 0), (0, PAGE)] {
        guest.balloon.write_config(12, &poison.to_le_bytes());
        let _ = guest.send(HINTS, &[Desc { at, bytes: 4, flags: 0, next: 0 }, page]);
        assert_eq!(guest.balloon.status().hinted_bytes, hinted);
    }
}

#[test]
fn the_driver_learns_the_target_and_says_how_far_it_is() {
    let mut guest = Guest::unstarted(false);
    assert_eq!(guest.balloon.set_target(0), Err(Refused::NoDriver));
    assert_eq!(guest.balloon.hint_begin(), Err(Refused::NoDriver));
    guest.start(feature::OFFERED & !feature::PAGE_POISON & !feature::FREE_PAGE_HINT);
    assert_eq!(guest.balloon.hint_begin(), Err(Refused::NoHints));
    let too_much = guest.balloon.set_target(MACHINE_BYTES + 1);
    let said = too_much.unwrap_err().to_string();
    assert!(said.contains(&MACHINE_BYTES.to_string()), "{said}");

    let before = guest.balloon.config_generation();
    assert_eq!(
        guest.balloon.set_target(MACHINE_BYTES - 10 * PAGE - 1),
        Ok(Interrupt::Configuration)
    );
    assert_ne!(guest.balloon.config_generation(), before);
    assert_eq!(config_word(&guest.balloon, 0), 10, "what the guest keeps is rounded up");
    // Byte by byte, and beyond what there is; what is the device's own is not changed.
    guest.balloon.write_config(0, &[0xff; 4]);
    guest.balloon.write_config(8, &[0xff; 4]);
    guest.balloon.write_config(4, &[7]);
    guest.balloon.write_config(14, &[9; 100]);
    guest.balloon.write_config(u64::MAX, &[9; 2]);
    let mut all = [1; 20];
    guest.balloon.read_config(0, &mut all);
    assert_eq!(all, [10, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 9, 0, 0, 0, 0]);
    guest.balloon.read_config(u64::MAX, &mut all);
    let status = guest.balloon.status();
    assert_eq!(status.target_bytes, MACHINE_BYTES - 10 * PAGE);
    assert_eq!(status.actual_bytes, MACHINE_BYTES - 7 * PAGE);
}

#[test]
fn features_that_do_not_fit_are_refused_and_queues_without_their_feature_are_none() {
    let mut guest = Guest::unstarted(false);
    assert!(!guest.balloon.accept(feature::STATISTICS), "without version 1");
    assert!(!guest.balloon.accept(feature::OFFERED | 1 << 29));
    guest.start(feature::VERSION_1);
    let free_page = free(FIRST_FREE * PAGE, 4096);
    guest.touch(Run::new(FIRST_FREE, 1));
    for queue in [STATISTICS, HINTS, REPORTS, 5, u16::MAX] {
        let due = match queue {
            0..5 => guest.send(queue, &[free_page]),
            _ => guest.notify(queue),
        };
        assert_eq!(due, None);
        assert!(guest.last_trouble().contains(&format!("no queue {queue}")));
    }
    assert_eq!(guest.resident(Run::new(FIRST_FREE, 1)), 1);
}

#[test]
fn what_is_in_the_queues_before_the_driver_is_ready_is_done_then() {
    let mut guest = Guest::unstarted(false);
    guest.set_up(feature::OFFERED);
    guest.touch(Run::new(FIRST_FREE, 1));
    let list = guest.list([FIRST_FREE]);
    assert_eq!(guest.send(INFLATE, &[list]), None);
    assert!(guest.ballooned().is_empty());
    assert_eq!(guest.balloon.start(&guest.ram, &guest.view), USED);
    assert_eq!(guest.ballooned().len(), 1);
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let mut guest = Guest::new();
    for (flags, due) in [(1u16, None), (0, USED)] {
        guest.ram.write_obj(flags, GuestAddress(ring(INFLATE))).unwrap();
        let list = guest.list([FIRST_FREE + u64::from(flags)]);
        assert_eq!(guest.send(INFLATE, &[list]), due);
    }
    assert_eq!(guest.used(INFLATE), 2);
}

fn statistics(guest: &mut Guest, free_bytes: u64) -> Desc {
    let mut bytes = 4u16.to_le_bytes().to_vec();
    bytes.extend(free_bytes.to_le_bytes());
    let at = guest.buffer(&bytes);
    Desc { at, bytes: 10, flags: 0, next: 0 }
}

#[test]
fn statistics_come_when_they_are_asked_for() {
    let mut guest = Guest::new();
    assert_eq!(guest.balloon.ask_statistics(&guest.ram), None, "nobody waits to be asked");
    for n in 1..4u16 {
        let buffer = statistics(&mut guest, n.into());
        assert_eq!(
            guest.send(STATISTICS, &[buffer]),
            None,
            "the buffer is kept until the next question"
        );
        assert_eq!(guest.used(STATISTICS), n - 1);
        let status = guest.balloon.status();
        assert_eq!(status.statistics.unwrap().free_bytes, Some(n.into()));
        assert_eq!(status.statistics_count, u64::from(n));
        assert_eq!(guest.balloon.ask_statistics(&guest.ram), USED);
        assert_eq!(guest.used(STATISTICS), n);
        assert_eq!(guest.balloon.ask_statistics(&guest.ram), None, "it was asked");
    }
    // Two at once: the first is of no use any more.
    for n in [8, 9] {
        let buffer = statistics(&mut guest, n);
        let _ = guest.send(STATISTICS, &[buffer]);
    }
    assert_eq!(guest.used(STATISTICS), 4);
    assert_eq!(guest.balloon.status().statistics.unwrap().free_bytes, Some(9));
    assert_eq!(guest.balloon.status().troubles, 0, "{}", guest.last_trouble());
}

/// What a guest does with the hints' queue.
enum Hint {
    /// A command id: the current one plus this.
    Command(u32),
    Stop,
    Page(u64),
    Ask,
    End,
}

#[test]
fn hints_count_only_for_the_command_that_is_current() {
    use Hint::{Ask, Command, End, Page, Stop};
    // What happens, pages that are taken then, whether no more will come, troubles.
    let cases: &[(&[Hint], &[u64], bool, u64)] = &[
        (&[Ask, Command(0), Page(1), Page(3), Stop], &[1, 3], true, 0),
        (&[Ask, Command(0), Page(1)], &[1], false, 0),
        (&[Ask], &[], false, 0),
        (&[Page(1), Stop], &[], true, 0),
        (&[Ask, Page(1)], &[], false, 1),
        (&[Ask, Command(1), Page(1), Stop], &[], false, 2),
        (&[Ask, Command(0), Page(1), Command(7), Page(2), Stop], &[1], false, 2),
        // What was under way when it was asked anew is of the old command.
        (&[Ask, Command(0), Ask, Page(1), Stop], &[], false, 1),
        (&[Ask, Command(0), Page(1), Ask, Command(0), Page(2), Stop], &[2], true, 0),
        (&[Ask, Command(0), Page(1), Stop, Page(2)], &[1], true, 1),
        (&[Ask, Command(0), End, Page(1), Stop], &[], true, 0),
    ];
    for (n, (steps, pages, over, troubles)) in cases.iter().enumerate() {
        let mut guest = Guest::new();
        for step in *steps {
            let send = |guest: &mut Guest, word: u32| {
                let at = guest.buffer(&word.to_le_bytes());
                guest.send(HINTS, &[Desc { at, bytes: 4, flags: 0, next: 0 }])
            };
            let id = config_word(&guest.balloon, 2);
            let due = match step {
                Ask => Some(guest.balloon.hint_begin().unwrap()),
                End => guest.balloon.hint_end(),
                Command(add) => send(&mut guest, id + add),
                Stop => send(&mut guest, 0),
                Page(n) => guest.send(HINTS, &[free((FIRST_FREE + n) * PAGE, 4096)]),
            };
            assert!(due.is_some());
        }
        let mut taken = PageSet::new();
        assert_eq!(guest.balloon.take_hints(&mut taken), *over, "case {n}");
        assert_eq!(taken, pages.iter().map(|p| Run::new(FIRST_FREE + p, 1)).collect(), "case {n}");
        let status = guest.balloon.status();
        assert_eq!(status.troubles, *troubles, "case {n}: {:?}", status.last_trouble);
        taken.clear();
        guest.balloon.take_hints(&mut taken);
        assert!(taken.is_empty(), "what was taken is not given again");
    }
}

#[test]
fn hints_of_one_chain_belong_to_the_command_before_them_and_the_memory_is_left_alone() {
    let mut guest = Guest::new();
    let _ = guest.balloon.hint_begin().unwrap();
    let id = config_word(&guest.balloon, 2);
    let run = Run::new(FIRST_FREE, 4);
    guest.touch(run);
    let words = [id, 0].map(|word: u32| {
        let at = guest.buffer(&word.to_le_bytes());
        Desc { at, bytes: 4, flags: 0, next: 0 }
    });
    let page = |n: u64| free((FIRST_FREE + n) * PAGE, 4096);
    let _ = guest.send(HINTS, &[page(0), words[0], page(1), page(2), words[1], page(3)]);
    let mut hints = PageSet::new();
    assert!(guest.balloon.take_hints(&mut hints));
    assert_eq!(hints, set(&[Run::new(FIRST_FREE + 1, 2)]));
    assert_eq!(guest.resident(run), 4, "a hint is only a claim");
    assert_eq!(guest.balloon.status().hinted_bytes, 2 * PAGE);
    assert_eq!(guest.balloon.hint_end(), Some(Interrupt::Configuration));
    assert_eq!(config_word(&guest.balloon, 2), 1, "DONE: the guest has its pages again");
    assert_eq!(guest.balloon.hint_end(), None);
}

#[test]
fn a_reset_forgets_what_the_driver_said_and_leaves_memory_and_target_alone() {
    let mut guest = Guest::new();
    let _ = guest.balloon.set_target(0).unwrap();
    let _ = guest.balloon.hint_begin().unwrap();
    let (list, buffer) = (guest.list([FIRST_FREE]), statistics(&mut guest, 1));
    let _ = guest.send(INFLATE, &[list]);
    let _ = guest.send(STATISTICS, &[buffer]);
    guest.touch(Run::new(FIRST_FREE + 1, 1));
    guest.balloon.reset();
    let status = guest.balloon.status();
    assert!(guest.ballooned().is_empty() && !status.driver && status.statistics.is_none());
    assert_eq!(status.target_bytes, 0);
    assert_eq!(config_word(&guest.balloon, 2), 0);
    assert_eq!(guest.resident(Run::new(FIRST_FREE, 2)), 1);
    assert_eq!(guest.balloon.ask_statistics(&guest.ram), None);
    assert_eq!(guest.notify(INFLATE), None);
}

/// One step of a driver that follows its target: a list of at most `most` pages, out of `pages` of the machine.
fn follow(guest: &mut Guest, pages: Run, most: u64) {
    let wanted = u64::from(config_word(&guest.balloon, 0));
    let inside = guest.ballooned().clone();
    let of =
        |members: bool| (pages.start..pages.end()).filter(move |g| inside.contains(*g) == members);
    let (queue, named): (u16, Vec<u64>) = if inside_pages(guest) < wanted {
        let room = most.min(wanted - inside_pages(guest));
        (INFLATE, of(false).take(usize::try_from(room).unwrap()).collect())
    } else {
        let room = most.min(inside_pages(guest) - wanted);
        (DEFLATE, of(true).take(usize::try_from(room).unwrap()).collect())
    };
    let list = guest.list(named.iter().copied());
    assert_eq!(guest.send(queue, &[list]), USED);
    if queue == DEFLATE {
        named.iter().for_each(|gfn| guest.touch(Run::new(*gfn, 1)));
    }
    let actual = u32::try_from(inside_pages(guest)).unwrap();
    guest.balloon.write_config(4, &actual.to_le_bytes());
}

fn inside_pages(guest: &Guest) -> u64 {
    guest.ballooned().len()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_guest_whose_target_moves_while_it_follows_gets_there_and_loses_nothing(
        targets in proptest::collection::vec((0u64..300, 0usize..6), 1..12),
        most in 1u64..80,
    ) {
        let mut guest = Guest::new();
        let pages = Run::new(FIRST_FREE, 300);
        guest.touch(pages);
        for (wanted, steps) in &targets {
            let _ = guest.balloon.set_target(MACHINE_BYTES - wanted * PAGE).unwrap();
            (0..*steps).for_each(|_| follow(&mut guest, pages, most));
        }
        (0..300).for_each(|_| follow(&mut guest, pages, most));
        let status = guest.balloon.status();
        prop_assert_eq!(status.actual_bytes, status.target_bytes);
        prop_assert_eq!(MACHINE_BYTES - status.ballooned_bytes, status.target_bytes);
        prop_assert_eq!(status.troubles, 0);
        for gfn in (pages.start..pages.end()).filter(|gfn| !guest.ballooned().contains(*gfn)) {
            let mut word = [0; 8];
            guest.view.read(gfn, &mut word).unwrap();
            prop_assert_eq!(u64::from_le_bytes(word), gfn, "a page in use lost what was in it");
        }
    }
}
