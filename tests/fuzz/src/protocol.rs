//! Source and destination against peers that say anything at any time, and against each other over a link
//! that is cut.
//!
//! Engines are honest: they carry out what they are asked for, in order, and answer. A machine's permit is
//! followed wherever it goes.

mod destination;
mod source;

use std::collections::VecDeque;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use ferry_pages::{PageSet, Run};
use ferry_protocol::{MachineSpec, PackedPages, ToDestination, ToSource};

use destination::DestinationHost;
use source::SourceHost;

const PAGES: u64 = 64;
const SESSION: u128 = 7;
const MACHINE: u128 = 99;
const CODECS: u8 = 0b1111;
const STEPS: usize = 400;

/// The first byte says who is honest.
pub fn protocol(data: &[u8]) {
    let Some((way, data)) = data.split_first() else { return };
    let mut u = Unstructured::new(data);
    // An error is the end of the bytes.
    let _ = match way % 3 {
        0 => hostile_destination(&mut u),
        1 => hostile_source(&mut u),
        _ => cut_link(&mut u),
    };
}

fn spec() -> MachineSpec {
    MachineSpec {
        name: "m".into(),
        vmm: "test".into(),
        extents: vec![(0, PAGES)],
        vcpus: 1,
        cpu_features: Vec::new(),
        devices: Vec::new(),
        config: Vec::new(),
    }
}

fn pages(u: &mut Unstructured<'_>) -> Result<PageSet> {
    let mut pages = PageSet::new();
    for _ in 0..u.int_in_range(0..=3)? {
        pages.insert_run(Run::new(u.int_in_range(0..=PAGES - 1)?, 1));
    }
    if u.ratio(1, 8)? {
        pages.insert_run(Run::new(0, PAGES));
    }
    Ok(pages)
}

/// Pages that the machine has, or anything.
fn packed(u: &mut Unstructured<'_>) -> Result<PackedPages> {
    if u.ratio(1, 8)? {
        let beyond: PageSet = [Run::new(u.int_in_range(0..=PAGES * 2)?, 3)].into_iter().collect();
        return Ok(PackedPages::pack(&beyond));
    }
    Ok(PackedPages::pack(&pages(u)?))
}

/// The time since the last event: nothing, a moment, or longer than anybody waits.
fn passes(u: &mut Unstructured<'_>) -> Result<Duration> {
    Ok(Duration::from_millis(*u.choose(&[0, 0, 0, 1, 100, 6_000, 61_000, 4_000_000])?))
}

fn hostile_destination(u: &mut Unstructured<'_>) -> Result<()> {
    let mut host = SourceHost::new(u)?;
    for _ in 0..STEPS {
        host.now += passes(u)?;
        match u.int_in_range(0..=5)? {
            0..=2 => drop(host.work(u)?),
            3..=4 => host.hears(source::anything(u, host.round)?),
            _ => host.misfortune(u)?,
        }
    }
    host.ends()
}

fn hostile_source(u: &mut Unstructured<'_>) -> Result<()> {
    let mut host = DestinationHost::default();
    for _ in 0..STEPS {
        host.now += passes(u)?;
        match u.int_in_range(0..=5)? {
            0..=1 => drop(host.work(u)?),
            2..=4 => host.hears(destination::anything(u)?),
            _ => host.misfortune(u)?,
        }
    }
    Ok(())
}

/// What is on its way.
#[derive(Default)]
struct Link {
    up: bool,
    to_destination: VecDeque<ToDestination>,
    to_source: VecDeque<ToSource>,
    /// Rounds of the batches on the lanes.
    batches: Vec<u32>,
}

fn cut_link(u: &mut Unstructured<'_>) -> Result<()> {
    let (mut source, mut destination) = (SourceHost::new(u)?, DestinationHost::default());
    let mut link = Link { up: true, ..Link::default() };
    for _ in 0..STEPS {
        let passed = passes(u)?;
        source.now += passed;
        destination.now += passed;
        match u.int_in_range(0..=11)? {
            0..=3 => {
                let did = source.work(u)?;
                if let Some(done) = did.rejoins {
                    let reached = u.ratio(3, 4)?;
                    link = Link { up: reached, ..Link::default() };
                    if !reached {
                        source.loses_the_link();
                    } else if let Some(answer) = destination.rejoined(done) {
                        link.to_source.push_back(answer);
                    }
                }
                if link.up {
                    link.to_destination.extend(did.said);
                    link.batches.extend(did.batches);
                }
            }
            4..=6 => {
                let did = destination.work(u)?;
                if link.up {
                    link.to_source.extend(did);
                }
            }
            7 => {
                if let Some(message) = link.to_source.pop_front() {
                    source.hears(message);
                }
            }
            8 => {
                if let Some(message) = link.to_destination.pop_front() {
                    destination.hears(message);
                }
            }
            9 => {
                if !link.batches.is_empty() {
                    let which = u.choose_index(link.batches.len())?;
                    destination.installs(link.batches.swap_remove(which));
                }
            }
            10 => {
                if u.ratio(1, 4)? && link.up {
                    link = Link::default();
                    source.loses_the_link();
                    destination.loses_the_link();
                } else if u.ratio(1, 2)? {
                    destination.has_all();
                }
            }
            _ => {
                source.ticks();
                destination.ticks();
            }
        }
        assert!(!(source.runs() && destination.runs()), "the machine runs twice");
    }
    Ok(())
}
