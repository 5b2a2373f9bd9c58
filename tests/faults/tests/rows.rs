//! Every row of the table is run: a part of them by default, all of them with both guests by
//! `make faults`. `FERRY_FAULTS=words` runs those whose names have these words.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ferry_faults::ends::Knew;
use ferry_faults::table::{Trial, markdown, trials};

/// Most of them wait for time-outs most of the time.
const AT_ONCE: usize = 16;

/// By the line of the table, the first guest that it is run with.
type Measured = BTreeMap<usize, Knew>;

fn run(mut all: Vec<Trial>) {
    all.sort_by_key(|trial| std::cmp::Reverse(trial.waits()));
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let measured = Mutex::new(Measured::new());
    ferry_e2e::ferry();
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(trial) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let began = Instant::now();
                    let said = match catch_unwind(AssertUnwindSafe(|| trial.run())) {
                        Ok(Some(knew)) => {
                            if trial.is_first {
                                measured.lock().unwrap().insert(trial.line, knew);
                            }
                            words(&knew)
                        }
                        Ok(None) => "not run".into(),
                        Err(why) => {
                            let why = why.downcast_ref::<String>().cloned();
                            let why = why.unwrap_or_else(|| "a panic".into());
                            failed.lock().unwrap().push(format!("{}: {why}", trial.name()));
                            "FAILED".into()
                        }
                    };
                    println!("{:5.1} s: {}: {said}", began.elapsed().as_secs_f64(), trial.name());
                }
            });
        }
    });
    if std::env::var_os("FERRY_FAULTS_WRITE").is_some() {
        write(&measured.into_inner().unwrap());
    }
    let failed = failed.into_inner().unwrap();
    assert!(
        failed.is_empty(),
        "{} of {} rows failed:\n{}",
        failed.len(),
        all.len(),
        failed.join("\n")
    );
}

fn words(knew: &Knew) -> String {
    let side = |knew: Option<Duration>| match knew {
        Some(time) => format!("{:.1} s", time.as_secs_f64()),
        None => "–".into(),
    };
    format!("{}, {}", side(knew.source), side(knew.destination))
}

#[test]
fn chosen_rows_of_the_table_are_true() {
    let mut all = trials();
    let named = std::env::var("FERRY_FAULTS");
    all.retain(|trial| named.as_ref().map_or(trial.chosen, |words| trial.name().contains(words)));
    run(all);
}

#[test]
#[ignore = "takes ten minutes: `make faults`"]
fn every_row_of_the_table_is_true_of_both_guests() {
    run(trials());
}

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/FAULTS.md");

/// Writes the table of the page anew.
fn write(measured: &Measured) {
    let column = |line: usize| measured.get(&line).map(words).unwrap_or_default();
    let (text, [from, to]) = page();
    let text = format!("{}{}{}", &text[..from], markdown(column), &text[to..]);
    std::fs::write(PAGE, text).expect("the page can be written");
}

/// The page, and where its table begins and ends.
fn page() -> (String, [usize; 2]) {
    let text = std::fs::read_to_string(Path::new(PAGE)).expect("docs/FAULTS.md");
    let from = text.find("| fault |").expect("the table");
    let to = text[from..].find("\n\n").map_or(text.len(), |n| from + n + 1);
    (text, [from, to])
}

#[test]
fn the_table_of_the_docs_is_the_one_that_is_run() {
    let (text, [from, to]) = page();
    let table = &text[from..to];
    // The last column was measured once, on one machine.
    let without = |text: &str| -> Vec<String> {
        let rows = text.lines().map(|row| row.rsplitn(3, '|').last().unwrap_or_default());
        rows.map(str::to_owned).collect()
    };
    let (said, run) = (without(table), without(&markdown(|_| String::new())));
    for (said, run) in said.iter().zip(&run) {
        assert_eq!(said, run, "`FERRY_FAULTS_WRITE=1 make faults` writes the table anew");
    }
    assert_eq!(said.len(), run.len(), "rows that are not run, or runs that are no rows");
}
