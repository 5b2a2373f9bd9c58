//! What a page costs that holds nothing.

use std::hint::black_box;
use std::time::Instant;

use ferry_codec::is_zero;
use ferry_migrate::Guest;
use ferry_pages::{PAGE_BYTES, Run};
use ferry_process_guest::{ProcessGuest, ProcessHost};

use crate::figures::Figures;
use crate::moves::{Destination, process};
use crate::{Failure, GIB, Plan};

const PAGE: u64 = PAGE_BYTES as u64;
const SMALL_BYTES: u64 = GIB;
const MORE_UNTOUCHED_BYTES: u64 = 8 * GIB;
const ZERO: Run = Run::new(SMALL_BYTES / 2 / PAGE, 2 * GIB / PAGE);
const GOAL_NS: f64 = 50.0;

pub(crate) fn measure(plan: &Plan) -> Result<(), Failure> {
    let destination = Destination::new(&plan.pki, ProcessHost::default())?;
    let total = |memory_bytes: u64, prepare: &dyn Fn(&ProcessGuest) -> Result<(), Failure>| {
        let guest = process(memory_bytes, "pattern=idle")?;
        prepare(&guest)?;
        let (report, ..) = destination.take(guest, &plan.options)?;
        Ok::<_, Failure>((report.total_ms, report.pages.zero))
    };
    let nothing = |_: &ProcessGuest| Ok(());
    let (mut small, mut untouched, mut read, mut written, mut test) =
        (vec![], vec![], vec![], vec![], vec![]);
    let large = SMALL_BYTES + ZERO.pages * PAGE;
    for turn in 0..=plan.repeats {
        let runs = [
            total(SMALL_BYTES, &nothing)?,
            total(SMALL_BYTES + MORE_UNTOUCHED_BYTES, &nothing)?,
            total(large, &nothing)?,
            total(large, &|guest| {
                let memory = guest.memory();
                let mut byte = [0];
                for gfn in ZERO.start..ZERO.end() {
                    memory.read(gfn, &mut byte)?;
                }
                Ok(())
            })?,
            total(large, &|guest| Ok(guest.memory().prefault_write(ZERO)?))?,
        ];
        let [a, b, c, d, e] = runs.map(|(ms, _)| ms);
        if runs[4].1 < ZERO.pages {
            return Err(format!("{} zero pages were sent of {}", runs[4].1, ZERO.pages).into());
        }
        let zero_test = zero_test_ns();
        if turn > 0 {
            let ns = |ms: f64, pages: u64| ms * 1e6 / pages as f64;
            small.push(a);
            untouched.push(ns(b - a, MORE_UNTOUCHED_BYTES / PAGE));
            read.push(ns(d - c, ZERO.pages));
            written.push(ns(e - c, ZERO.pages));
            test.push(zero_test);
        }
    }
    println!("\nPages that hold nothing, ns each (goal: below {GOAL_NS:.0})");
    println!("  {:<44} {:.1} ms", "a whole move of 1 GiB, all untouched", Figures::new(small));
    for (what, values) in [
        ("untouched (8 GiB more)", untouched),
        ("read, never written (2 GiB)", read),
        ("written with zeros (2 GiB)", written),
    ] {
        let values = Figures::new(values);
        let verdict = if values.median() < GOAL_NS { "met" } else { "MISSED" };
        println!("  {what:<44} {values:.1}: {verdict}");
    }
    println!("  {:<44} {:.1}", "for comparison: only reading such a page", Figures::new(test));
    Ok(())
}

/// What it takes one core to read a page from memory and see that it is zero, at least.
fn zero_test_ns() -> f64 {
    const PAGES: usize = 65536;
    let mut memory = vec![0u8; PAGES * PAGE_BYTES];
    // Written, so that it is not the one page of zeros that the kernel shows for all.
    for page in memory.chunks_mut(PAGE_BYTES) {
        page[0] = black_box(0);
    }
    let began = Instant::now();
    let zero = black_box(&memory).chunks(PAGE_BYTES).filter(|page| is_zero(page)).count();
    let ns = began.elapsed().as_secs_f64() * 1e9;
    ns / black_box(zero) as f64
}
