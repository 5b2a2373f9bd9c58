//! BENCHMARKS.md, from the results.

use std::fmt::Write;

use crate::Failure;
use crate::cases::{CASES, Case, LINKS, Link, case, link};
use crate::goals::judged;
use crate::record::{Environment, Figures, Line, Move, Who};
use crate::summary::{Series, best, moves};

type Column = (&'static str, usize, fn(&Figures) -> Option<f64>);

/// What is told of each move: its heading, decimals, and where it is.
const COLUMNS: [Column; 11] = [
    ("total, ms", 0, |f| Some(f.total_ms)),
    ("downtime, ms", 1, |f| Some(f.downtime_ms)),
    ("longest stall, ms", 1, |f| Some(f.stall_ms)),
    ("MB on the link", 1, |f| Some(f.bytes as f64 / 1e6)),
    ("guest's speed, %", 0, |f| Some(100.0 * f.speed)),
    ("CPU, s", 2, |f| Some(f.cpu_s)),
    ("wait, mean, µs", 0, |f| f.waits.map(|w| w.mean_us)),
    ("wait, p99, µs", 0, |f| f.waits.map(|w| w.p99_us)),
    ("beyond the guest, MiB", 0, |f| Some(f.beyond_mib)),
    ("total foretold, ms", 0, |f| f.foretold_ms),
    ("downtime as reported, ms", 1, |f| Some(f.downtime_said_ms)),
];
/// Of which a ratio is told.
const RATIOS: std::ops::Range<usize> = 0..8;

const METHOD: &str = include_str!("method.md");

/// The page; `note` stands at its top.
pub(crate) fn page(lines: &[Line], note: Option<&str>) -> Result<String, Failure> {
    let moves = moves(lines);
    let mut out = String::from(
        "# Ferry beside QEMU\n\nWritten by `make bench-peers` from its measurements, rows that Ferry loses included. Do not edit.\n",
    );
    if let Some(note) = note {
        writeln!(out, "\n> {note}")?;
    }
    environments(&mut out, lines)?;
    goals(&mut out, &moves)?;
    for link in LINKS {
        measured(&mut out, &moves, link)?;
    }
    out.push('\n');
    out.push_str(METHOD);
    settings(&mut out, &moves)?;
    Ok(out)
}

fn environments(out: &mut String, lines: &[Line]) -> Result<(), Failure> {
    let mut all: Vec<&Environment> = Vec::new();
    for line in lines {
        if let Line::Environment(e) = line {
            all.push(e);
        }
    }
    out.push_str("\n## Where\n\n| begun | commit | CPU | cores | kernel | QEMU | load then |\n|---|---|---|---|---|---|---|\n");
    for e in all {
        let scope = if e.quick { " (quick)" } else { "" };
        let Environment { date, commit, cpu, cores, kernel, qemu, load, .. } = e;
        writeln!(
            out,
            "| {date}{scope} | {commit} | {cpu} | {cores} | {kernel} | {qemu} | {load} |"
        )?;
    }
    Ok(())
}

fn goals(out: &mut String, moves: &[Move]) -> Result<(), Failure> {
    let goals = judged(moves)?;
    let met = goals.iter().filter(|g| g.met).count();
    writeln!(out, "\n## Goals\n\n{met} of {} are met.\n", goals.len())?;
    let missing = not_measured(moves);
    if !missing.is_empty() {
        writeln!(out, "Not measured, and so neither met nor missed: {missing}.\n")?;
    }
    out.push_str("| link | case | goal | measured | wanted | |\n|---|---|---|---|---|---|\n");
    for g in goals {
        let met = if g.met { "met" } else { "**missed**" };
        writeln!(
            out,
            "| {} | {} | {} | {} | {} | {met} |",
            g.link, g.case, g.what, g.measured, g.wanted
        )?;
    }
    Ok(())
}

/// The cases of each link that no move of Ferry was counted for.
fn not_measured(moves: &[Move]) -> String {
    let of = |link: &Link| {
        let lacks = |c: &&Case| Series::of(moves, c.name, link.name, Who::Ferry).count() == 0;
        let names: Vec<&str> = CASES.iter().filter(lacks).map(|c| c.name).collect();
        (!names.is_empty()).then(|| format!("over {} {}", link.what, names.join(", ")))
    };
    LINKS.iter().filter_map(of).collect::<Vec<_>>().join("; ")
}

fn measured(out: &mut String, moves: &[Move], link: &Link) -> Result<(), Failure> {
    let here: Vec<&Case> = CASES
        .iter()
        .filter(|c| moves.iter().any(|m| m.case == c.name && m.link == link.name))
        .collect();
    if here.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "\n## Over {}\n\nMedian (least–most). Ratios are Ferry's figure as a share of QEMU's in the same turn.",
        link.what
    )?;
    for case in here {
        writeln!(out, "\n### `{}`: {}\n", case.name, case.what)?;
        let rows: Vec<(String, Option<Who>)> = [("QEMU, TLS", true), ("QEMU, plain", false)]
            .map(|(name, tls)| (name, best(moves, case.name, link.name, tls)))
            .map(|(name, setting)| match setting {
                Some(s) => (format!("{name}: {}", s.words()), Some(Who::Qemu(s))),
                None => (format!("{name}: no setting of those tried ends"), None),
            })
            .into();
        let ferry = Series::of(moves, case.name, link.name, Who::Ferry);
        heads(out, "")?;
        figures(out, "Ferry", &ferry)?;
        for (name, who) in &rows {
            match who {
                Some(who) => figures(out, name, &Series::of(moves, case.name, link.name, *who))?,
                None => writeln!(out, "| {name} {}", "| – ".repeat(COLUMNS.len() + 1) + "|")?,
            }
        }
        for (name, who) in &rows {
            let Some(who) = who else { continue };
            let other = Series::of(moves, case.name, link.name, *who);
            let name = name.split(':').next().unwrap_or_default();
            write!(out, "| *Ferry / {name}* | ")?;
            for (i, (_, _, figure)) in COLUMNS.iter().enumerate() {
                let ratio = RATIOS.contains(&i).then(|| ferry.ratio(&other, figure)).flatten();
                write!(out, "| {} ", ratio.map_or("–".into(), |r| format!("*{r:.2}*")))?;
            }
            out.push_str("|\n");
        }
    }
    Ok(())
}

fn heads(out: &mut String, first: &str) -> Result<(), Failure> {
    let names: Vec<&str> = COLUMNS.iter().map(|(name, ..)| *name).collect();
    writeln!(out, "| {first} | moves | {} |", names.join(" | "))?;
    Ok(writeln!(out, "|---{}|", "|---".repeat(COLUMNS.len() + 1))?)
}

fn figures(out: &mut String, name: &str, series: &Series<'_>) -> Result<(), Failure> {
    let failed = series.failures();
    let count = match failed {
        None => series.count().to_string(),
        Some((n, why)) => format!("{}, {n} failed: {why}", series.count()),
    };
    write!(out, "| {name} | {count} ")?;
    for (_, digits, figure) in COLUMNS {
        let spread = series.spread(figure);
        write!(out, "| {} ", spread.map_or("–".into(), |s| format!("{s:.digits$}")))?;
    }
    out.push_str("|\n");
    Ok(())
}

/// Every setting of QEMU that was tried, once.
fn settings(out: &mut String, moves: &[Move]) -> Result<(), Failure> {
    out.push_str("\n## Settings of QEMU that were tried\n\nOnce each, before the turns that count; those in bold were chosen.\n");
    out.push_str("\n| link | case | setting | | total, ms | downtime, ms | MB on the link | guest's speed, % |\n|---|---|---|---|---|---|---|---|\n");
    for m in moves.iter().filter(|m| m.turn.is_none()) {
        let Who::Qemu(setting) = m.who else { continue };
        if case(&m.case).is_none() || link(&m.link).is_none() {
            return Err(format!(
                "the results have a case `{}` on `{}`, which is unknown",
                m.case, m.link
            )
            .into());
        }
        let chosen = best(moves, &m.case, &m.link, setting.tls) == Some(setting);
        let bold = if chosen { "**" } else { "" };
        let crypt = if setting.tls { "TLS" } else { "plain" };
        write!(out, "| {} | {} | {bold}{}{bold} | {crypt} ", m.link, m.case, setting.words())?;
        match &m.outcome {
            Ok(f) => writeln!(
                out,
                "| {:.0} | {:.1} | {:.1} | {:.0} |",
                f.total_ms,
                f.downtime_ms,
                f.bytes as f64 / 1e6,
                100.0 * f.speed
            )?,
            Err(why) => writeln!(out, "| {} | | | |", why.replace(['|', '\n'], " "))?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::Setting;
    use crate::record::Waits;

    #[test]
    fn the_page_shows_losing_rows_failures_and_what_was_chosen() {
        let of = |who, turn, total_ms| {
            let waits = Some(Waits { count: 1, mean_us: 5.0, p99_us: 9.0 });
            let figures = Figures { total_ms, downtime_ms: 3.0, waits, ..Figures::default() };
            Line::Move(Box::new(Move {
                case: "idle".into(),
                link: "1g".into(),
                who,
                turn,
                outcome: Ok(figures),
            }))
        };
        let qemu = Who::Qemu(Setting { tls: true, channels: 2, ..Setting::PLAIN });
        let mut lines =
            vec![of(qemu, None, 100.0), of(qemu, Some(0), 100.0), of(Who::Ferry, Some(0), 250.0)];
        let mut failed = of(Who::Qemu(Setting::PLAIN), None, 0.0);
        if let Line::Move(m) = &mut failed {
            m.outcome = Err("not within 30 s".into());
        }
        lines.push(failed);
        let page = page(&lines, Some("A note.")).unwrap();
        for words in [
            "> A note.",
            "### `idle`: idle, 0.5 GiB",
            "neither met nor missed: over loopback idle, set, fast",
            "; over 1 Gbit/s set, fast",
            "| *Ferry / QEMU, TLS* | | *2.50 (2.50–2.50)* |",
            "| QEMU, TLS: multifd 2 | 1 | 100 (100–100) |",
            "| QEMU, plain: no setting of those tried ends |",
            "| **multifd 2** | TLS | 100 |",
            "| not within 30 s |",
            "| 2.50 (2.50–2.50) | ≤ 1.00 | **missed** |",
            "## How",
        ] {
            assert!(page.contains(words), "`{words}` is not in:\n{page}");
        }
    }
}
