//! What was measured, as lines of JSON: a run that was interrupted goes on where it was.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::Failure;
use crate::cases::Setting;

/// A line of the results.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "snake_case")]
pub(crate) enum Line {
    /// Where what follows was measured.
    Environment(Environment),
    /// A move.
    Move(Box<Move>),
}

/// The machine, and what ran on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Environment {
    pub(crate) date: String,
    pub(crate) commit: String,
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) kernel: String,
    pub(crate) qemu: String,
    pub(crate) load: String,
    /// Only some of the cases and settings.
    pub(crate) quick: bool,
}

/// Who moved the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Who {
    Ferry,
    Qemu(Setting),
}

/// One move.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Move {
    pub(crate) case: String,
    pub(crate) link: String,
    pub(crate) who: Who,
    /// None for the one by which a setting is chosen; then which of those that count.
    pub(crate) turn: Option<u32>,
    /// What came of it; why nothing, if so.
    pub(crate) outcome: Result<Figures, String>,
}

/// What a move took. Times in ms.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figures {
    /// From the command until the guest ran at the destination with all of its memory there.
    pub(crate) total_ms: f64,
    /// From when the guest was last seen to run at the source until it was first at the destination.
    pub(crate) downtime_ms: f64,
    /// The total time that the VMM foretold as the move began.
    #[serde(default)]
    pub(crate) foretold_ms: Option<f64>,
    /// The downtime that the VMM reports.
    pub(crate) downtime_said_ms: f64,
    /// The longest time in which the guest was not seen to run.
    pub(crate) stall_ms: f64,
    /// Over the link, headers included, both ways.
    pub(crate) bytes: u64,
    /// Pages visited a second meanwhile, as a share of that before.
    pub(crate) speed: f64,
    /// CPU time of both ends, vCPUs left out.
    pub(crate) cpu_s: f64,
    /// Most memory beyond the guest's, of the process that had more.
    pub(crate) beyond_mib: f64,
    /// Visits that took long, at the destination while pages were owed.
    pub(crate) waits: Option<Waits>,
    /// What the VMM says of how it went.
    pub(crate) how: String,
}

/// Visits that took long, as the guest saw them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Waits {
    pub(crate) count: u64,
    pub(crate) mean_us: f64,
    pub(crate) p99_us: f64,
}

impl Move {
    /// Whether `other` is of the same case, link and setting.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        (&self.case, &self.link, self.who) == (&other.case, &other.link, other.who)
    }
}

/// Reads what was measured before; nothing if there is no file.
///
/// # Errors
/// A line in the middle that is none. The last one may be cut off.
pub(crate) fn read(path: &Path) -> Result<Vec<Line>, Failure> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(format!("{}: {e}", path.display()).into()),
    };
    let mut lines = Vec::new();
    for (number, line) in text.lines().enumerate() {
        match serde_json::from_str(line) {
            Ok(line) => lines.push(line),
            Err(_) if number + 1 == text.lines().count() && !text.ends_with('\n') => {}
            Err(e) => {
                return Err(format!("{}, line {}: {e}", path.display(), number + 1).into());
            }
        }
    }
    Ok(lines)
}

/// Adds a line, as a whole.
pub(crate) fn append(path: &Path, line: &Line) -> Result<(), Failure> {
    let text = serde_json::to_string(line)? + "\n";
    // A line that was cut off is ended.
    let cut = fs::read(path).is_ok_and(|bytes| bytes.last().is_some_and(|b| *b != b'\n'));
    if cut {
        let whole = read(path)?;
        let text: Result<String, _> =
            whole.iter().map(|l| serde_json::to_string(l).map(|l| l + "\n")).collect();
        fs::write(path, text?)?;
    }
    let mut file = File::options().create(true).append(true).open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moved(turn: u32) -> Line {
        Line::Move(Box::new(Move {
            case: "idle".into(),
            link: "1g".into(),
            who: Who::Qemu(Setting::PLAIN),
            turn: Some(turn),
            outcome: Ok(Figures {
                total_ms: 1.5,
                waits: Some(Waits::default()),
                ..Figures::default()
            }),
        }))
    }

    #[test]
    fn what_was_written_is_read_and_a_line_that_was_cut_off_is_measured_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results");
        assert_eq!(read(&path).unwrap(), []);
        append(&path, &moved(0)).unwrap();
        append(&path, &moved(1)).unwrap();
        assert_eq!(read(&path).unwrap(), [moved(0), moved(1)]);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, &text[..text.len() - 20]).unwrap();
        assert_eq!(read(&path).unwrap(), [moved(0)]);
        append(&path, &moved(2)).unwrap();
        assert_eq!(read(&path).unwrap(), [moved(0), moved(2)]);
        fs::write(&path, "junk\n").unwrap();
        let why = read(&path).unwrap_err().to_string();
        assert!(why.contains("results, line 1"), "{why}");
    }
}
