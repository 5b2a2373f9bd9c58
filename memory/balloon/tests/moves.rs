//! A balloon that moves with its machine.

#![expect(unsafe_code, reason = "memory of a machine, by its address")]

mod driver;

use driver::{Desc, FIRST_FREE, Guest, HIGH, PAGE, free, set};
use ferry_balloon::{Balloon, BalloonState, HINTS, INFLATE, Interrupt, REPORTS, STATISTICS};
use ferry_pages::{PageSet, Run};
use serde_json::{Value, json};

/// A guest in the middle of everything.
fn busy() -> Guest {
    let mut guest = Guest::new();
    let _ = guest.balloon.set_target(PAGE).unwrap();
    guest.balloon.write_config(4, &9u32.to_le_bytes());
    let list = guest.list([FIRST_FREE, FIRST_FREE + 1, FIRST_FREE + 5, HIGH.start]);
    let _ = guest.send(INFLATE, &[list]);
    let _ = guest.send(REPORTS, &[free((FIRST_FREE + 9) * PAGE, 8192)]);
    let at = guest.buffer(&[4, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
    let _ = guest.send(STATISTICS, &[Desc { at, bytes: 10, flags: 0, next: 0 }]);
    let _ = guest.send(INFLATE, &[free(0, 4)]);
    let _ = guest.balloon.hint_begin().unwrap();
    let mut id = [0; 4];
    guest.balloon.read_config(8, &mut id);
    let at = guest.buffer(&id);
    let command = Desc { at, bytes: 4, flags: 0, next: 0 };
    let _ = guest.send(HINTS, &[command, free((FIRST_FREE + 20) * PAGE, 4096)]);
    guest
}

#[test]
fn a_balloon_goes_on_where_it_was_saved() {
    let mut guest = busy();
    let saved = serde_json::to_string(&guest.balloon.save()).unwrap();
    let state: BalloonState = serde_json::from_str(&saved).unwrap();
    let (moved, due) = Balloon::restore(state, &guest.view).unwrap();
    let (before, mut after) = (guest.balloon.status(), moved.status());
    assert_eq!((before.hinted_bytes, after.hinted_bytes), (PAGE, 0));
    after.hinted_bytes = PAGE;
    assert_eq!(before, after);
    assert_eq!((before.troubles, before.statistics_count), (1, 1));
    let pages =
        set(&[Run::new(FIRST_FREE, 2), Run::new(FIRST_FREE + 5, 1), Run::new(HIGH.start, 1)]);
    assert_eq!(*moved.ballooned(), pages);

    // Who asked for hints is not here: the guest may have its pages back.
    assert_eq!(due, Some(Interrupt::Configuration));
    let mut command = [0; 4];
    moved.read_config(8, &mut command);
    assert_eq!(command, [1, 0, 0, 0]);
    assert_ne!(moved.config_generation(), guest.balloon.config_generation());
    guest.balloon = moved;
    assert!(guest.balloon.take_hints(&mut PageSet::new()));

    // Queues go on at the next entry; the guest still waits to be asked for statistics.
    let used = guest.used(INFLATE);
    let list = guest.list([FIRST_FREE + 2]);
    assert_eq!(guest.send(INFLATE, &[list]), Some(Interrupt::UsedBuffers));
    assert_eq!(guest.used(INFLATE), used + 1);
    assert_eq!(guest.balloon.ask_statistics(&guest.ram), Some(Interrupt::UsedBuffers));

    // Without hints there is nothing new to tell.
    let (again, due) = Balloon::restore(guest.balloon.save(), &guest.view).unwrap();
    assert_eq!(due, None);
    assert_eq!(again.save(), guest.balloon.save());
}

#[test]
fn a_guest_that_makes_a_queue_smaller_can_still_be_moved() {
    let mut guest = busy();
    let at = guest.buffer(&[0; 10]);
    guest.describe(STATISTICS, 9, &[Desc { at, bytes: 10, flags: 0, next: 0 }]);
    guest.offer(STATISTICS, 9);
    assert_eq!(guest.notify(STATISTICS), Some(Interrupt::UsedBuffers), "the one before comes back");
    guest.balloon.queue(STATISTICS.into()).unwrap().try_set_size(8).unwrap();
    let (mut moved, _) = Balloon::restore(guest.balloon.save(), &guest.view).unwrap();
    assert_eq!(moved.ask_statistics(&guest.ram), None);
    assert_eq!(moved.status().troubles, guest.balloon.status().troubles);
}

#[test]
fn state_that_no_balloon_of_the_machine_can_be_in_is_refused() {
    let guest = busy();
    let good = serde_json::to_value(guest.balloon.save()).unwrap();
    let cases: &[(&str, Value, &str)] = &[
        ("/features", json!(1u64 << 29), "features"),
        ("/queues", json!([]), "0 queues"),
        ("/queues/0/size", json!(3), "queue size"),
        ("/queues/0/size", json!(256), "queue size"),
        ("/queues/1/desc_table", json!(8), "alignment"),
        ("/queues/1/avail_ring", json!(1), "alignment"),
        ("/queues/1/used_ring", json!(2), "alignment"),
        ("/wanted_pages", json!(5121), "5121 pages"),
        ("/ballooned", json!([[4095, 2]]), "2 pages from frame 0xfff"),
        ("/ballooned", json!([[5000, 1]]), "1 pages"),
        ("/ballooned", json!([[10, 0]]), "0 pages"),
        ("/ballooned", json!([[10, 5], [14, 1]]), "frame 0xe"),
        ("/ballooned", json!([[10, 5], [2, 1]]), "frame 0x2"),
        ("/ballooned", json!([[u32::MAX, u32::MAX]]), "pages from frame"),
    ];
    for (place, value, words) in cases {
        let mut bad = good.clone();
        *bad.pointer_mut(place).unwrap() = value.clone();
        let state: BalloonState = serde_json::from_value(bad).unwrap();
        let said = Balloon::restore(state, &guest.view).unwrap_err().to_string();
        assert!(said.contains(words), "{place} {value}: {said}");
    }
    let state: BalloonState = serde_json::from_value(good).unwrap();
    assert!(Balloon::restore(state, &guest.view).is_ok());
}
