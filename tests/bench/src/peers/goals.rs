//! What Ferry shall reach beside QEMU, and whether it does.

use crate::Failure;
use crate::cases::{CASES, Case, Kind, LINKS, Link};
use crate::needed;
use crate::record::{Figures, Move, Who};
use crate::summary::{Series, Spread, best};

/// A goal, for a case on a link.
pub(crate) struct Goal {
    pub(crate) case: &'static str,
    pub(crate) link: &'static str,
    pub(crate) what: String,
    /// What was measured, with its unit.
    pub(crate) measured: String,
    pub(crate) wanted: String,
    pub(crate) met: bool,
}

struct Judge<'a> {
    case: &'static Case,
    link: &'static Link,
    ferry: Series<'a>,
    goals: Vec<Goal>,
}

impl Judge<'_> {
    fn add(&mut self, what: impl Into<String>, measured: String, wanted: String, met: bool) {
        let (case, link) = (self.case.name, self.link.name);
        self.goals.push(Goal { case, link, what: what.into(), measured, wanted, met });
    }

    /// A ratio to QEMU; nothing where there is nothing to compare.
    fn ratio(
        &mut self,
        what: &str,
        other: &Series<'_>,
        figure: impl Fn(&Figures) -> Option<f64>,
        most: f64,
    ) {
        if let Some(ratio) = self.ferry.ratio(other, figure) {
            let wanted = format!("≤ {most:.2}");
            self.add(what, format!("{ratio:.2}"), wanted, ratio.median <= most);
        }
    }
}

/// Every goal for which something was measured.
pub(crate) fn judged(moves: &[Move]) -> Result<Vec<Goal>, Failure> {
    let mut all = Vec::new();
    for link in LINKS {
        for case in CASES {
            let ferry = Series::of(moves, case.name, link.name, Who::Ferry);
            if ferry.count() > 0 {
                let mut judge = Judge { case, link, ferry, goals: Vec::new() };
                judge.all(moves)?;
                all.append(&mut judge.goals);
            }
        }
        all.extend(sparse(moves, link));
        all.extend(foretold(moves, link));
    }
    Ok(all)
}

impl Judge<'_> {
    fn all(&mut self, moves: &[Move]) -> Result<(), Failure> {
        let (case, link) = (self.case, self.link);
        let of = |tls| best(moves, case.name, link.name, tls).map(Who::Qemu);
        let [tls, plain] = [true, false]
            .map(|tls| of(tls).map(|who| Series::of(moves, case.name, link.name, who)));
        let total: fn(&Figures) -> Option<f64> = |f| Some(f.total_ms);
        let downtime: fn(&Figures) -> Option<f64> = |f| Some(f.downtime_ms);
        let failed = self.ferry.failures().map_or(0, |(n, _)| n);
        let ended = format!("{} of {}", self.ferry.count() - failed, self.ferry.count());
        self.add("it ends", ended, "always".into(), failed == 0);
        if let Some(spread) = self.ferry.spread(downtime) {
            self.add("downtime", format!("{spread:.1} ms"), "< 5 ms".into(), spread.median < 5.0);
        }
        if let Some(spread) = self.ferry.spread(|f| Some(f.beyond_mib)) {
            let met = spread.most < 128.0;
            self.add(
                "memory beyond the guest",
                format!("{spread:.0} MiB"),
                "< 128 MiB".into(),
                met,
            );
        }
        if let (Some(rate), Kind::Quiet) = (link.bits_per_s, case.kind) {
            let least_ms = needed::bytes(case)? * 8e3 / rate as f64;
            // Of nothing but zeros nothing is needed, and nothing is a share of that.
            if let (Some(spread), true) = (self.ferry.spread(total), least_ms > 0.0) {
                let share = spread.median / least_ms;
                let what = "total time / (bytes needed / rate)";
                self.add(what, format!("{share:.2}"), "≤ 1.10".into(), share <= 1.1);
            }
        }
        if let Some(tls) = &tls {
            self.ratio("downtime / QEMU's with TLS", tls, downtime, 0.1);
            self.ratio("CPU time / QEMU's with TLS", tls, |f| Some(f.cpu_s), 1.0);
            let fast_writer = case.name == "fast" && link.bits_per_s.is_some();
            if link.bits_per_s.is_none() {
                self.ratio("total time / QEMU's with TLS", tls, total, 0.5);
            } else if fast_writer {
                self.ratio("total time / QEMU's with TLS", tls, total, 1.0 / 3.0);
                if let Some(ratio) = self.ferry.ratio(tls, |f| Some(f.speed)) {
                    let met = ratio.median >= 2.0;
                    self.add(
                        "guest's speed / QEMU's with TLS",
                        format!("{ratio:.2}"),
                        "≥ 2.00".into(),
                        met,
                    );
                }
            } else {
                self.ratio("total time / QEMU's with TLS", tls, total, 1.0);
            }
            if case.kind == Kind::PostCopy {
                self.ratio("mean wait / QEMU's with TLS", tls, |f| Some(f.waits?.mean_us), 0.5);
                self.ratio("wait, p99 / QEMU's with TLS", tls, |f| Some(f.waits?.p99_us), 0.25);
            }
        }
        if let Some(plain) = &plain {
            self.ratio("downtime / QEMU's in plain text", plain, downtime, 1.0);
            self.ratio("total time / QEMU's in plain text", plain, total, 1.0);
            if case.kind == Kind::PostCopy {
                self.ratio(
                    "mean wait / QEMU's in plain text",
                    plain,
                    |f| Some(f.waits?.mean_us),
                    1.0,
                );
                self.ratio(
                    "wait, p99 / QEMU's in plain text",
                    plain,
                    |f| Some(f.waits?.p99_us),
                    1.0,
                );
            }
        }
        Ok(())
    }
}

/// Memory that was never touched costs next to nothing.
fn sparse(moves: &[Move], link: &'static Link) -> Option<Goal> {
    let of = |case: &str| {
        Series::of(moves, case, link.name, Who::Ferry)
            .spread(|f| Some(f.total_ms))
            .map(|s| s.median)
    };
    let ratio = of("sparse-8g")? / of("full-1g")?;
    Some(Goal {
        case: "sparse-8g",
        link: link.name,
        what: "total time / that of `full-1g`".into(),
        measured: format!("{ratio:.2}"),
        wanted: "≤ 1.20".into(),
        met: ratio <= 1.2,
    })
}

/// What was foretold beside what came: the median of the cases.
fn foretold(moves: &[Move], link: &'static Link) -> Option<Goal> {
    let of = |case: &Case| {
        Series::of(moves, case.name, link.name, Who::Ferry)
            .spread(|f| Some((f.foretold_ms? / f.total_ms - 1.0).abs()))
            .map(|s| 100.0 * s.median)
    };
    let error = Spread::of(CASES.iter().filter_map(of))?;
    Some(Goal {
        case: "all",
        link: link.name,
        what: "total time foretold, off by".into(),
        measured: format!("{error:.0} %"),
        wanted: "≤ 15 %".into(),
        met: error.median <= 15.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::Setting;

    fn of(case: &str, who: Who, turn: Option<u32>, total_ms: f64, downtime_ms: f64) -> Move {
        let figures = Figures { total_ms, downtime_ms, cpu_s: 1.0, ..Figures::default() };
        Move { case: case.into(), link: "1g".into(), who, turn, outcome: Ok(figures) }
    }

    fn met(goals: &[Goal], what: &str) -> bool {
        goals.iter().find(|g| g.what == what).unwrap_or_else(|| panic!("no goal {what}")).met
    }

    #[test]
    fn a_goal_is_met_at_its_bound_and_missed_beyond() {
        let tls = Who::Qemu(Setting { tls: true, ..Setting::PLAIN });
        let measured = |total, downtime| {
            let moves = [
                of("fast", tls, None, 3000.0, 40.0),
                of("fast", tls, Some(0), 3000.0, 40.0),
                of("fast", Who::Ferry, Some(0), total, downtime),
            ];
            judged(&moves).unwrap()
        };
        let good = measured(1000.0, 4.0);
        assert!(good.iter().filter(|g| !g.what.contains("speed")).all(|g| g.met));
        let bad = measured(1001.0, 4.1);
        assert!(!met(&bad, "downtime / QEMU's with TLS") && met(&bad, "downtime"));
        assert!(!met(&bad, "total time / QEMU's with TLS"));
    }

    #[test]
    fn a_move_that_failed_misses_a_goal_and_nothing_measured_has_none() {
        let mut failed = of("idle", Who::Ferry, Some(0), 1.0, 1.0);
        failed.outcome = Err("lost".into());
        let goals = judged(&[failed]).unwrap();
        assert_eq!(goals.len(), 1);
        assert!(!met(&goals, "it ends"));
        assert!(judged(&[]).unwrap().is_empty());
    }

    #[test]
    fn what_was_foretold_is_off_by_the_median_of_the_cases_either_way() {
        let off = |shares: &[f64]| {
            let moves: Vec<Move> = CASES
                .iter()
                .zip(shares)
                .map(|(case, share)| {
                    let mut this = of(case.name, Who::Ferry, Some(0), 1000.0, 1.0);
                    if let Ok(f) = &mut this.outcome {
                        f.foretold_ms = Some(1000.0 * share);
                    }
                    this
                })
                .collect();
            met(&judged(&moves).unwrap(), "total time foretold, off by")
        };
        assert!(off(&[1.14, 0.86, 9.0]) && !off(&[0.84, 1.16, 1.0]));
    }

    #[test]
    fn untouched_memory_is_compared_with_a_small_guest() {
        let moves = [
            of("full-1g", Who::Ferry, Some(0), 1000.0, 1.0),
            of("sparse-8g", Who::Ferry, Some(0), 1300.0, 1.0),
        ];
        assert!(!met(&judged(&moves).unwrap(), "total time / that of `full-1g`"));
    }
}
