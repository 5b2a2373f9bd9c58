//! What many moves come to: QEMU's best setting, medians, ratios.

use std::fmt;

use crate::cases::Setting;
use crate::record::{Figures, Line, Move, Who};

/// The moves among the results.
pub(crate) fn moves(lines: &[Line]) -> Vec<Move> {
    let is_move = |line: &Line| match line {
        Line::Move(this) => Some((**this).clone()),
        Line::Environment(_) => None,
    };
    lines.iter().filter_map(is_move).collect()
}

/// QEMU's best setting for a case on a link, of those that encrypt or of those that do not: the one with the
/// least product of total time and downtime, so that neither is bought with more of the other. None if all
/// failed.
pub(crate) fn best(moves: &[Move], case: &str, link: &str, tls: bool) -> Option<Setting> {
    let product = |f: &Figures| f.total_ms * f.downtime_ms;
    moves
        .iter()
        .filter(|m| m.case == case && m.link == link && m.turn.is_none())
        .filter_map(|m| match (m.who, &m.outcome) {
            (Who::Qemu(setting), Ok(figures)) if setting.tls == tls => {
                Some((setting, product(figures)))
            }
            _ => None,
        })
        .min_by(|(_, a), (_, b)| a.total_cmp(b))
        .map(|(setting, _)| setting)
}

/// What was measured several times.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Spread {
    /// None of nothing. The median of an even number is the mean of the two in the middle.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let half = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[half]
        } else {
            f64::midpoint(values[half - 1], values[half])
        };
        Some(Self { median, least, most })
    }
}

/// `median (least–most)`, with as many decimals as asked for.
impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision().unwrap_or(1);
        write!(f, "{:.digits$} ({:.digits$}–{:.digits$})", self.median, self.least, self.most)
    }
}

/// The counted moves of one VMM over one link.
pub(crate) struct Series<'a> {
    moves: Vec<&'a Move>,
}

impl<'a> Series<'a> {
    pub(crate) fn of(moves: &'a [Move], case: &str, link: &str, who: Who) -> Self {
        let ours = |m: &&Move| m.case == case && m.link == link && m.who == who && m.turn.is_some();
        Self { moves: moves.iter().filter(ours).collect() }
    }

    /// How many there were.
    pub(crate) fn count(&self) -> usize {
        self.moves.len()
    }

    /// Those that failed, with the reason of the last.
    pub(crate) fn failures(&self) -> Option<(usize, &'a str)> {
        let failed: Vec<&str> = self
            .moves
            .iter()
            .filter_map(|m| m.outcome.as_ref().err().map(String::as_str))
            .collect();
        failed.last().map(|why| (failed.len(), *why))
    }

    fn turns(&self) -> impl Iterator<Item = (Option<u32>, &'a Figures)> {
        self.moves.iter().filter_map(|m| m.outcome.as_ref().ok().map(|f| (m.turn, f)))
    }

    /// One figure of all.
    pub(crate) fn spread(&self, figure: impl Fn(&Figures) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.turns().filter_map(|(_, f)| figure(f)))
    }

    /// One figure as a share of `other`'s, each move beside the one of the same turn.
    pub(crate) fn ratio(
        &self,
        other: &Self,
        figure: impl Fn(&Figures) -> Option<f64>,
    ) -> Option<Spread> {
        let pairs = self.turns().filter_map(|(turn, ours)| {
            let theirs = other.turns().find(|(of, _)| *of == turn)?.1;
            Some(figure(ours)? / figure(theirs)?)
        });
        Spread::of(pairs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(who: Who, turn: Option<u32>, total_ms: f64, downtime_ms: f64) -> Move {
        let figures = Figures { total_ms, downtime_ms, ..Figures::default() };
        Move { case: "c".into(), link: "l".into(), who, turn, outcome: Ok(figures) }
    }

    #[test]
    fn the_best_setting_is_that_with_the_least_product_of_total_time_and_downtime() {
        let set = |channels, tls| Setting { channels, tls, ..Setting::PLAIN };
        let tried =
            |channels, tls, total, down| of(Who::Qemu(set(channels, tls)), None, total, down);
        let mut moves = vec![
            tried(1, false, 100.0, 50.0),
            tried(2, false, 150.0, 20.0),
            tried(3, false, 9000.0, 1.0),
            tried(1, true, 500.0, 9.0),
        ];
        assert_eq!(best(&moves, "c", "l", false), Some(set(2, false)));
        assert_eq!(best(&moves, "c", "l", true), Some(set(1, true)));
        moves[1].outcome = Err("it did not end".into());
        assert_eq!(best(&moves, "c", "l", false), Some(set(1, false)));
        moves.retain(|m| m.outcome.is_err());
        assert_eq!(best(&moves, "c", "l", false), None);
        // What counts is not what chooses.
        assert_eq!(best(&[of(Who::Qemu(set(1, true)), Some(0), 1.0, 1.0)], "c", "l", true), None);
    }

    #[test]
    fn ratios_are_of_moves_of_the_same_turn_and_a_failed_one_has_none() {
        let qemu = Who::Qemu(Setting::PLAIN);
        let mut moves = Vec::new();
        for (turn, (ours, theirs)) in
            [(10.0, 100.0), (20.0, 100.0), (90.0, 300.0)].into_iter().enumerate()
        {
            let turn = u32::try_from(turn).ok();
            moves.push(of(Who::Ferry, turn, ours, 1.0));
            moves.push(of(qemu, turn, theirs, 2.0));
        }
        let total = |f: &Figures| Some(f.total_ms);
        let ratio = |moves: &[Move]| {
            let [ours, theirs] = [Who::Ferry, qemu].map(|who| Series::of(moves, "c", "l", who));
            ours.ratio(&theirs, total)
        };
        let spread = ratio(&moves).unwrap();
        assert!(
            (spread.median - 0.2).abs() < 1e-9 && (spread.most - 0.3).abs() < 1e-9,
            "{spread:?}"
        );
        moves[5].outcome = Err("no".into());
        let spread = ratio(&moves).unwrap();
        assert!((spread.median - 0.15).abs() < 1e-9, "{spread:?}");
        assert_eq!(Series::of(&moves, "c", "l", qemu).failures(), Some((1, "no")));
        assert_eq!(Series::of(&moves, "c", "other", qemu).spread(total), None);
    }

    #[test]
    fn a_spread_is_the_middle_and_both_ends() {
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([f64::NAN]), None);
        let spread = Spread::of([5.0, 1.0, 2.0]).unwrap();
        assert_eq!(format!("{spread:.0}"), "2 (1–5)");
        assert_eq!(Spread::of([1.0, 2.0]).unwrap().median, 1.5);
    }
}
