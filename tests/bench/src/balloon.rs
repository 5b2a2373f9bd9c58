//! What the balloon costs beside what the kernel takes to give the same memory back.

use std::time::Instant;

use ferry_balloon::{Balloon, INFLATE, QUEUE_SIZE, feature};
use ferry_memory::{GuestView, Mapping};
use ferry_pages::{PAGE_BYTES, Run};
use rand::seq::SliceRandom;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::figures::Figures;
use crate::{Failure, GIB, Plan};

const PAGES: u64 = GIB / PAGE_BYTES as u64;
/// Where the memory is that is given back; queues and lists are below.
const GIVEN: Run = Run::new(PAGES, PAGES);
/// Pages in a list: as many as Linux sends in one.
const LIST: usize = 256;
const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const LISTS: u64 = 0x10_0000;
const GOAL: f64 = 0.80;

pub(crate) fn measure(plan: &Plan) -> Result<(), Failure> {
    let view = GuestView::of(vec![(GIVEN.start, Mapping::anonymous(GIVEN.pages)?)])?;
    let upwards: Vec<u64> = (GIVEN.start..GIVEN.end()).collect();
    let downwards: Vec<u64> = upwards.iter().rev().copied().collect();
    let mut shuffled = upwards.clone();
    shuffled.shuffle(&mut rand::rng());
    // What is inflated, how many lists at once, and whether there is a goal.
    let cases = [
        ("pages upwards, as many lists as fit in the queue", &upwards, QUEUE_SIZE, true),
        ("pages downwards", &downwards, QUEUE_SIZE, true),
        ("upwards, one list of 256 pages at a time, as Linux does", &upwards, 1, true),
        ("pages in no order, most of them discarded singly", &shuffled, QUEUE_SIZE, false),
    ];
    let mut ratios = cases.map(|_| Vec::new());
    let mut plain = Vec::new();
    for turn in 0..=plan.repeats {
        view.prefault_write(GIVEN)?;
        let began = Instant::now();
        view.discard(GIVEN)?;
        let discard = began.elapsed().as_secs_f64();
        for ((_, pages, at_once, _), ratios) in cases.iter().zip(&mut ratios) {
            view.prefault_write(GIVEN)?;
            let inflate = inflate(&view, pages, *at_once)?;
            if turn > 0 {
                ratios.push(discard / inflate);
            }
        }
        if turn > 0 {
            plain.push(discard * 1e3);
        }
    }
    println!(
        "\nA balloon takes in 1 GiB of resident memory: rate beside that of one plain MADV_DONTNEED"
    );
    println!("  {:<58} {:.1} ms", "one plain MADV_DONTNEED", Figures::new(plain));
    for ((what, _, _, goal), ratios) in cases.iter().zip(ratios) {
        let figures = Figures::new(ratios);
        let verdict = match (goal, figures.median() >= GOAL) {
            (false, _) => String::new(),
            (true, true) => format!(" (goal: at least {GOAL:.2}: met)"),
            (true, false) => format!(" (goal: at least {GOAL:.2}: MISSED)"),
        };
        println!("  {what:<58} {figures:.2}{verdict}");
    }
    Ok(())
}

/// Seconds that the device takes for `pages`, `at_once` lists in each notification.
fn inflate(view: &GuestView, pages: &[u64], at_once: u16) -> Result<f64, Failure> {
    let ram = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 64 << 20)])?;
    let mut balloon = Balloon::new(GIB);
    if !balloon.accept(feature::VERSION_1) {
        return Err("the balloon is not of virtio 1".into());
    }
    let queue = balloon.queue(INFLATE.into()).ok_or("no inflate queue")?;
    queue.try_set_desc_table_address(GuestAddress(TABLE))?;
    queue.try_set_avail_ring_address(GuestAddress(AVAIL))?;
    queue.try_set_used_ring_address(GuestAddress(USED))?;
    queue.set_ready(true);
    let _ = balloon.start(&ram, view);

    let list_bytes = u32::try_from(LIST * 4)?;
    let lists: Vec<&[u64]> = pages.chunks(LIST).collect();
    for (at, list) in (LISTS..).step_by(LIST * 4).zip(&lists) {
        for (at, gfn) in (at..).step_by(4).zip(*list) {
            ram.write_obj(u32::try_from(*gfn)?, GuestAddress(at))?;
        }
    }
    for slot in 0..u64::from(QUEUE_SIZE) {
        ram.write_obj(u16::try_from(slot)?, GuestAddress(AVAIL + 4 + slot * 2))?;
    }
    let (mut available, mut seconds, mut next) = (0u16, 0.0, LISTS);
    for now in lists.chunks(at_once.into()) {
        for _ in now {
            let entry = TABLE + u64::from(available % QUEUE_SIZE) * 16;
            ram.write_obj(next, GuestAddress(entry))?;
            ram.write_obj(u64::from(list_bytes), GuestAddress(entry + 8))?;
            next += u64::from(list_bytes);
            available = available.wrapping_add(1);
        }
        ram.write_obj(available, GuestAddress(AVAIL + 2))?;
        let began = Instant::now();
        let _ = balloon.notify(INFLATE, &ram, view);
        seconds += began.elapsed().as_secs_f64();
    }
    if balloon.ballooned().len() != pages.len() as u64 || !view.resident()?.is_empty() {
        return Err(format!("not all is in the balloon: {:?}", balloon.status()).into());
    }
    Ok(seconds)
}
