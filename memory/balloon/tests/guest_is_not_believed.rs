//! Drivers that do not keep to the specification, by mistake or with intent.

#![expect(unsafe_code, reason = "memory of a machine, by its address")]

mod driver;

use std::collections::BTreeSet;

use driver::{
    Desc, FIRST_FREE, Guest, HIGH, INDIRECT, LOW, NEXT, PAGE, SIZE, WRITE, free, ring, table,
};
use ferry_balloon::{
    Balloon, DEFLATE, HINTS, INFLATE, Interrupt, QUEUES, REPORTS, STATISTICS, feature,
};
use ferry_pages::{PageSet, Run};
use proptest::prelude::*;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

const OUTSIDE: u64 = LOW.pages * PAGE;

fn readable(at: u64, bytes: u32) -> Desc {
    Desc { at, bytes, flags: 0, next: 0 }
}

/// Name, queue, what the guest does, a word of the trouble, pages that are in the balloon nevertheless.
type Case = (&'static str, u16, fn(&mut Guest), &'static str, u64);

#[rustfmt::skip]
const CASES: &[Case] = &[
    ("a list that the device is to write", INFLATE, |g| {
        let list = g.list([FIRST_FREE]);
        let _ = g.send(INFLATE, &[Desc { flags: WRITE, ..list }]);
    }, "to write to", 0),
    ("a list of three bytes", INFLATE, |g| {
        let list = g.list([FIRST_FREE]);
        let _ = g.send(INFLATE, &[Desc { bytes: 3, ..list }]);
    }, "3 bytes", 0),
    ("a list outside memory", INFLATE, |g| {
        let _ = g.send(INFLATE, &[readable(OUTSIDE, 8)]);
    }, "outside guest memory", 0),
    ("a list at the end of all addresses", INFLATE, |g| {
        let _ = g.send(INFLATE, &[readable(u64::MAX - 3, 4)]);
    }, "outside guest memory", 0),
    ("a list that ends outside memory", INFLATE, |g| {
        let at = OUTSIDE - 4;
        g.ram.write_slice(&600u32.to_le_bytes(), GuestAddress(at)).unwrap();
        let _ = g.send(INFLATE, &[readable(at, 8)]);
    }, "outside guest memory", 0),
    ("a list of as many bytes as can be said", INFLATE, |g| {
        let _ = g.send(INFLATE, &[readable(0, u32::MAX - 3)]);
    }, "named twice", u64::MAX),
    ("no list at all", INFLATE, |g| {
        let _ = g.send(INFLATE, &[readable(0, 0)]);
        assert_eq!(g.balloon.status().troubles, 0);
        g.describe(INFLATE, 0, &[readable(0, 3)]);
        g.offer(INFLATE, 0);
        let _ = g.notify(INFLATE);
    }, "3 bytes", 0),
    ("pages outside memory", INFLATE, |g| {
        let list = g.list([FIRST_FREE, LOW.end(), HIGH.start - 1, HIGH.end(), u32::MAX.into()]);
        let _ = g.send(INFLATE, &[list]);
    }, "4 pages that the machine does not have", 1),
    ("a run that leads out of memory", INFLATE, |g| {
        let list = g.list(LOW.end() - 2..LOW.end() + 5);
        let _ = g.send(INFLATE, &[list]);
    }, "5 pages that the machine does not have", 2),
    ("pages twice in a list", INFLATE, |g| {
        let list = g.list([FIRST_FREE, FIRST_FREE + 7, FIRST_FREE]);
        let _ = g.send(INFLATE, &[list]);
    }, "1 pages named twice", 2),
    ("pages that are in the balloon", INFLATE, |g| {
        for _ in 0..2 {
            let list = g.list([FIRST_FREE, FIRST_FREE + 7]);
            let _ = g.send(INFLATE, &[list]);
        }
    }, "2 pages that were in the balloon already", 2),
    ("pages that are not in the balloon", DEFLATE, |g| {
        let list = g.list([FIRST_FREE, FIRST_FREE + 7]);
        let _ = g.send(DEFLATE, &[list]);
    }, "2 pages leave the balloon that were not in it", 0),
    ("a chain that loops", INFLATE, |g| {
        let list = g.list([FIRST_FREE]);
        g.describe(INFLATE, 0, &[Desc { flags: NEXT, next: 0, ..list }]);
        g.offer(INFLATE, 0);
        let _ = g.notify(INFLATE);
    }, "does not end", 0),
    ("a chain that leads out of its table", INFLATE, |g| {
        let list = g.list([FIRST_FREE]);
        g.describe(INFLATE, 0, &[Desc { flags: NEXT, next: SIZE, ..list }]);
        g.offer(INFLATE, 0);
        let _ = g.notify(INFLATE);
    }, "does not end", 0),
    ("a head outside the table", INFLATE, |g| {
        g.offer(INFLATE, SIZE);
        let _ = g.notify(INFLATE);
    }, "a chain at 16 of a queue of 16", 0),
    ("a table elsewhere that leads elsewhere", INFLATE, |g| {
        let inner = readable(table(INFLATE), 16);
        let at = g.buffer(&Desc { flags: INDIRECT, ..inner }.bytes());
        let _ = g.send(INFLATE, &[Desc { at, bytes: 16, flags: INDIRECT, next: 0 }]);
    }, "without a buffer", 0),
    ("a table elsewhere that is not whole entries", INFLATE, |g| {
        let list = g.list([FIRST_FREE]);
        let at = g.buffer(&list.bytes());
        let _ = g.send(INFLATE, &[Desc { at, bytes: 15, flags: INDIRECT, next: 0 }]);
    }, "without a buffer", 0),
    ("a table elsewhere, longer than the queue", INFLATE, |g| {
        let list = g.list([FIRST_FREE]);
        let entries: Vec<u8> = (0..SIZE + 4)
            .flat_map(|n| Desc { flags: NEXT, next: n + 1, ..list }.bytes())
            .chain(list.bytes())
            .collect();
        let at = g.buffer(&entries);
        let bytes = u32::try_from(entries.len()).unwrap();
        let _ = g.send(INFLATE, &[Desc { at, bytes, flags: INDIRECT, next: 0 }]);
    }, "does not end", 0),
    ("more chains than there is room for", INFLATE, |g| {
        g.ram.write_obj(SIZE + 1, GuestAddress(ring(INFLATE) + 2)).unwrap();
        let _ = g.notify(INFLATE);
        g.ram.write_obj(0u16, GuestAddress(ring(INFLATE) + 2)).unwrap();
    }, "more descriptors to process than queue size", 0),
    ("a ring outside memory", INFLATE, |g| {
        let queue = g.balloon.queue(INFLATE.into()).unwrap();
        queue.try_set_used_ring_address(GuestAddress(OUTSIDE - 64)).unwrap();
        let list = g.list([FIRST_FREE]);
        let _ = g.send(INFLATE, &[list]);
        let queue = g.balloon.queue(INFLATE.into()).unwrap();
        queue.try_set_used_ring_address(GuestAddress(driver::used_ring(INFLATE))).unwrap();
        queue.set_next_avail(1);
    }, "outside guest memory", 0),
    ("a notification before the queue is ready", INFLATE, |g| {
        g.balloon.queue(INFLATE.into()).unwrap().set_ready(false);
        let _ = g.notify(INFLATE);
        g.balloon.queue(INFLATE.into()).unwrap().set_ready(true);
    }, "before it is ready", 0),
    ("a report that the device is to read", REPORTS, |g| {
        let _ = g.send(REPORTS, &[readable(FIRST_FREE * PAGE, 4096)]);
    }, "to read from", 0),
    ("a report beyond all addresses", REPORTS, |g| {
        let _ = g.send(REPORTS, &[free(u64::MAX - 10, 4096)]);
    }, "beyond all addresses", 0),
    ("a report outside memory", REPORTS, |g| {
        let _ = g.send(REPORTS, &[free(OUTSIDE, 8192)]);
    }, "2 pages that the machine does not have", 0),
    ("reports of more than there is", REPORTS, |g| {
        let _ = g.send(REPORTS, &[free(0, 5121 * 4096)]);
    }, "than the machine has", 0),
    ("a hint command of eight bytes", HINTS, |g| {
        let _ = g.balloon.hint_begin().unwrap();
        let _ = g.send(HINTS, &[readable(0, 8)]);
    }, "8 bytes", 0),
    ("a hint command outside memory", HINTS, |g| {
        let _ = g.balloon.hint_begin().unwrap();
        let _ = g.send(HINTS, &[readable(OUTSIDE, 4)]);
    }, "outside guest memory", 0),
    ("hints outside memory", HINTS, |g| {
        let _ = g.send(HINTS, &[free(OUTSIDE, 4096)]);
    }, "1 pages that the machine does not have", 0),
    ("statistics outside memory", STATISTICS, |g| {
        let _ = g.send(STATISTICS, &[readable(OUTSIDE, 100)]);
    }, "outside guest memory", 0),
    ("statistics in a chain that loops", STATISTICS, |g| {
        g.describe(STATISTICS, 0, &[Desc { at: 0, bytes: 10, flags: NEXT, next: 0 }]);
        g.offer(STATISTICS, 0);
        let _ = g.notify(STATISTICS);
    }, "does not end", 0),
];

#[test]
fn what_makes_no_sense_is_left_out_and_named_and_the_queue_goes_on() {
    for (name, queue, act, words, pages) in CASES {
        let mut guest = Guest::new();
        act(&mut guest);
        let status = guest.balloon.status();
        let last = guest.last_trouble();
        assert!(status.troubles > 0, "{name} was not noticed");
        assert!(last.contains(words), "{name}: {last}");
        if *pages != u64::MAX {
            assert_eq!(guest.ballooned().len(), *pages, "{name}");
        }
        // The queue goes on.
        let run = Run::new(FIRST_FREE + 100, 5);
        guest.touch(run);
        let (ballooned, used) = (guest.ballooned().clone(), guest.used(*queue));
        let request = match *queue {
            REPORTS | HINTS => free(run.start * PAGE, 5 * 4096),
            _ => guest.list(run.start..run.end()),
        };
        let due = guest.send(*queue, &[request]);
        if *queue == STATISTICS {
            assert!(guest.balloon.ask_statistics(&guest.ram).is_some(), "{name}");
        } else {
            assert_eq!(due, Some(Interrupt::UsedBuffers), "{name}");
        }
        assert!(guest.used(*queue) > used, "{name}");
        match *queue {
            INFLATE | REPORTS => assert_eq!(guest.resident(run), 0, "{name}"),
            _ => assert_eq!(*guest.ballooned(), ballooned, "{name}"),
        }
    }
}

/// The queues' addresses and sizes as a guest may set them.
fn set_up(guest: &mut Guest, queue: u32, size: u16, places: [u64; 3]) {
    let queue = guest.balloon.queue(queue).unwrap();
    let _ = queue.try_set_size(size);
    let _ = queue.try_set_desc_table_address(GuestAddress(places[0]));
    let _ = queue.try_set_avail_ring_address(GuestAddress(places[1]));
    let _ = queue.try_set_used_ring_address(GuestAddress(places[2]));
}

/// An address that is often near something.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (1u64..16, 0u64..64).prop_map(|(page, at)| page * PAGE + at * 8),
        2 => (0..LOW.pages + 64).prop_map(|page| page * PAGE),
        1 => (0u64..64).prop_map(|near| OUTSIDE - 32 + near),
        1 => any::<u64>(),
    ]
}

fn descriptor() -> impl Strategy<Value = Desc> {
    let bytes =
        prop_oneof![3 => 0u32..64, 2 => (0u32..16).prop_map(|n| n * 4096), 1 => any::<u32>()];
    (address(), bytes, 0u16..8, 0u16..20).prop_map(|(at, bytes, flags, next)| Desc {
        at,
        bytes,
        flags,
        next,
    })
}

#[derive(Clone, Debug)]
enum Act {
    Random(u64, Vec<u8>),
    Describe(u16, u16, Vec<Desc>),
    Offer(u16, u16),
    Notify(u16),
    SetUp(u32, u16, [u64; 3]),
    Config(u64, Vec<u8>),
    Hint(bool),
    Ask,
    Restart(u64),
    Target(u64),
    Move,
}

fn act() -> impl Strategy<Value = Act> {
    let queue = 0u16..QUEUES + 1;
    prop_oneof![
        4 => (address(), proptest::collection::vec(any::<u8>(), 1..200)).prop_map(|(at, b)| Act::Random(at, b)),
        8 => (0..QUEUES, 0..SIZE, proptest::collection::vec(descriptor(), 1..8))
            .prop_map(|(queue, first, all)| Act::Describe(queue, first, all)),
        8 => (0..QUEUES, 0u16..18).prop_map(|(queue, head)| Act::Offer(queue, head)),
        8 => queue.prop_map(Act::Notify),
        1 => (0u32..QUEUES.into(), (0u32..16).prop_map(|n| 1 << n), [address(), address(), address()])
            .prop_map(|(queue, size, places)| Act::SetUp(queue, size, places)),
        1 => (0u64..20, proptest::collection::vec(any::<u8>(), 1..8)).prop_map(|(at, b)| Act::Config(at, b)),
        1 => any::<bool>().prop_map(Act::Hint),
        1 => Just(Act::Ask),
        1 => any::<u64>().prop_map(Act::Restart),
        1 => any::<u64>().prop_map(Act::Target),
        1 => Just(Act::Move),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 5000, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_a_guest_does_ends_the_device_or_names_a_page_that_is_not_its(
        acts in proptest::collection::vec(act(), 1..60),
    ) {
        let mut guest = Guest::new();
        let layout: PageSet = [LOW, HIGH].into_iter().collect();
        for act in acts {
            match act {
                Act::Random(at, bytes) => drop(guest.ram.write_slice(&bytes, GuestAddress(at))),
                Act::Describe(queue, first, all) => guest.describe(queue, first, &all),
                Act::Offer(queue, head) => guest.offer(queue, head),
                Act::Notify(queue) => drop(guest.notify(queue)),
                Act::SetUp(queue, size, places) => set_up(&mut guest, queue, size, places),
                Act::Config(at, bytes) => guest.balloon.write_config(at, &bytes),
                Act::Hint(true) => drop(guest.balloon.hint_begin()),
                Act::Hint(false) => drop(guest.balloon.hint_end()),
                Act::Ask => drop(guest.balloon.ask_statistics(&guest.ram)),
                Act::Restart(features) => {
                    guest.balloon.reset();
                    guest.balloon.accept(features);
                    guest.start(feature::OFFERED);
                }
                Act::Target(bytes) => drop(guest.balloon.set_target(bytes)),
                Act::Move => {
                    let state = guest.balloon.save();
                    let (moved, _) = Balloon::restore(state.clone(), &guest.view).unwrap();
                    prop_assert_eq!(moved.ballooned(), guest.balloon.ballooned());
                    guest.balloon = moved;
                }
            }
            let mut named = guest.ballooned().clone();
            guest.balloon.take_hints(&mut named);
            let mut outside = named.clone();
            outside.subtract(&layout);
            prop_assert!(outside.is_empty(), "{:?}", outside);
            let status = guest.balloon.status();
            prop_assert!(status.ballooned_bytes <= status.memory_bytes);
            prop_assert_eq!(status.troubles == 0, status.last_trouble.is_none());
        }
    }

}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_balloon_holds_what_went_in_and_did_not_come_out(
        steps in proptest::collection::vec(
            (any::<bool>(), proptest::collection::vec(FIRST_FREE..FIRST_FREE + 400, 1..60)), 1..30),
    ) {
        let mut guest = Guest::new();
        let mut model = BTreeSet::new();
        for (inflate, pages) in steps {
            // The pages out of the balloon are in use: all of them hold data.
            for gfn in (FIRST_FREE..FIRST_FREE + 400).filter(|gfn| !model.contains(gfn)) {
                guest.touch(Run::new(gfn, 1));
            }
            let lists: Vec<Desc> = pages.chunks(25).map(|some| guest.list(some.iter().copied())).collect();
            let _ = guest.send(if inflate { INFLATE } else { DEFLATE }, &lists);
            for gfn in pages {
                if inflate { model.insert(gfn) } else { model.remove(&gfn) };
            }
            let expected: PageSet = model.iter().map(|gfn| Run::new(*gfn, 1)).collect();
            prop_assert_eq!(guest.ballooned(), &expected);
            let mut kept = guest.view.resident().unwrap();
            kept.intersect_with(&expected);
            prop_assert!(kept.is_empty(), "in the balloon, and not given back: {:?}", kept);
        }
    }
}
