//! What was seen of a guest from outside while it moved: from looks at its status page at both hosts to
//! downtime, longest stall and speed.
//!
//! The guest publishes its counters and its clock at every step. A look that finds them changed finds a
//! guest that ran; at the destination that is not enough, as copies of the page come in while the guest
//! still runs at the source: there it runs once it is further than the source ever was.

use std::time::Duration;

/// Which host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Source,
    Destination,
}

/// A look at the status page at one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Look {
    /// When, from the first look.
    pub(crate) at: Duration,
    pub(crate) end: End,
    /// Pages visited so far.
    pub(crate) visits: u64,
    /// The guest's clock at its last step.
    pub(crate) clock: u64,
}

/// What the looks tell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Seen {
    /// When the guest was first seen to run at the destination.
    pub(crate) runs_there: Duration,
    /// From when it was last seen to run at the source until then.
    pub(crate) downtime: Duration,
    /// The longest time, from the command on, in which it was not seen to run.
    pub(crate) longest_stall: Duration,
}

/// Whether `now` is a guest that went on since `before`.
fn went_on(before: &Look, now: &Look) -> bool {
    now.clock != before.clock || now.visits != before.visits
}

/// What `looks`, in order of time, tell of a move that was asked for at `began`; none if the guest was not
/// seen at both hosts.
pub(crate) fn seen(looks: &[Look], began: Duration) -> Option<Seen> {
    let at_source: Vec<&Look> = looks.iter().filter(|l| l.end == End::Source).collect();
    let last = *at_source.last()?;
    let ran_at_source = at_source.windows(2).filter(|w| went_on(w[0], w[1])).map(|w| w[1].at);
    // It may stand still from the first look on.
    let mut ran: Vec<Duration> =
        at_source.first().map(|l| l.at).into_iter().chain(ran_at_source).collect();
    let left = *ran.last()?;
    let mut there = looks
        .iter()
        .filter(|l| l.end == End::Destination)
        .skip_while(|l| l.clock <= last.clock && l.visits <= last.visits);
    let first = there.next()?;
    ran.push(first.at);
    let mut before = first;
    for look in there {
        if went_on(before, look) {
            ran.push(look.at);
        }
        before = look;
    }
    let longest = ran.windows(2).filter(|w| w[1] >= began).map(|w| w[1].saturating_sub(w[0]));
    Some(Seen {
        runs_there: first.at,
        downtime: first.at.saturating_sub(left),
        longest_stall: longest.max()?,
    })
}

/// Pages visited a second between two times, or from the first look on; none if there were no looks.
pub(crate) fn speed(looks: &[Look], from: Duration, to: Duration) -> Option<f64> {
    let from = from.max(looks.first()?.at);
    // Copies at the destination are behind what is at the source.
    let upto = |t: Duration| looks.iter().take_while(|l| l.at <= t).map(|l| l.visits).max();
    let visits = upto(to)?.saturating_sub(upto(from)?);
    let seconds = to.saturating_sub(from).as_secs_f64();
    (seconds > 0.0).then(|| visits as f64 / seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn look(ms: u32, end: End, visits: u64) -> Look {
        Look { at: MS * ms, end, visits, clock: visits * 1000 }
    }

    /// Runs at the source until 10 ms, and from 15 ms on at the destination, where copies come in before.
    fn moved() -> Vec<Look> {
        let mut looks = Vec::new();
        for ms in 0..=30 {
            looks.push(look(ms, End::Source, u64::from(ms.min(10))));
            let copied = if ms < 12 { u64::from(ms.min(3)) } else { 10 };
            looks.push(look(
                ms,
                End::Destination,
                if ms < 15 { copied } else { u64::from(ms) - 4 },
            ));
        }
        looks
    }

    #[test]
    fn a_copy_that_comes_in_is_no_guest_that_runs() {
        let seen = seen(&moved(), Duration::ZERO).unwrap();
        assert_eq!(seen.runs_there, MS * 15);
        assert_eq!(seen.downtime, MS * 5);
        assert_eq!(seen.longest_stall, MS * 5);
    }

    #[test]
    fn a_stall_before_the_command_is_not_counted_and_one_after_is() {
        let mut looks = moved();
        looks.insert(0, Look { at: Duration::ZERO, end: End::Source, visits: 0, clock: 0 });
        for l in &mut looks[1..] {
            l.at += MS * 100;
            l.visits += 1;
            l.clock += 1000;
        }
        assert_eq!(seen(&looks, MS * 101).unwrap().longest_stall, MS * 5);
        assert_eq!(seen(&looks, MS * 50).unwrap().longest_stall, MS * 100);
        let at_25 = looks.iter().position(|l| l.at == MS * 125).unwrap();
        looks[at_25..].iter_mut().for_each(|l| l.at += MS * 40);
        assert_eq!(seen(&looks, MS * 101).unwrap().longest_stall, MS * 41);
    }

    #[test]
    fn a_guest_that_never_ran_there_or_was_not_seen_gives_nothing() {
        let stays: Vec<Look> = moved().into_iter().filter(|l| l.at < MS * 15).collect();
        assert_eq!(seen(&stays, Duration::ZERO), None);
        assert_eq!(seen(&[], Duration::ZERO), None);
        assert_eq!(speed(&[], Duration::ZERO, MS), None);
        assert_eq!(speed(&stays, MS, MS), None);
    }

    #[test]
    fn speed_counts_visits_at_both_hosts_once() {
        let looks = moved();
        assert_eq!(speed(&looks, Duration::ZERO, MS * 10), Some(1000.0));
        assert_eq!(speed(&looks, MS * 10, MS * 20), Some(600.0));
    }
}
