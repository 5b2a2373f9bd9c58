//! `ferry memory`: machines that share less memory than they have in all.

mod demo;
mod plan;
mod report;
mod run;
mod sharing;
mod stage;

use std::process::ExitCode;

use ferry_swap::Figures;
use indicatif::HumanBytes;

use crate::Failure;
use crate::args::Memory;
use crate::protocol::{LimitRequest, Request};
use crate::runtime_dir::RuntimeDir;

pub(crate) use sharing::{line as sharing_line, why_not as not_shared};

pub(crate) fn main(runtime: &RuntimeDir, command: &Memory) -> Result<ExitCode, Failure> {
    match command {
        Memory::Plan { file, json } => return plan::main(file, *json),
        Memory::Run { file, once, json } => return run::main(runtime, file, *once, *json),
        Memory::Demo(demo) => return demo::main(demo),
        Memory::Limit { name, limit, swap } => {
            let request = LimitRequest { bytes: limit.0, swap: swap.options() };
            crate::vm::ask(runtime, name, &Request::Limit(request))?;
        }
        Memory::Share { names, tenant, json } => {
            return sharing::main(runtime, names, tenant.as_deref(), *json);
        }
        Memory::Report { json } => report::main(runtime, *json)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// How a machine's swap stands, in a line.
pub(crate) fn swap_line(f: &Figures) -> String {
    let mut out = format!(
        "{} away ({} of pool, {} of file)",
        HumanBytes(f.swapped_bytes),
        HumanBytes(f.pool_bytes),
        HumanBytes(f.file_bytes)
    );
    match f.limit_bytes {
        Some(limit) => out += &format!(", kept within {} with its pool", HumanBytes(limit)),
        None => out += ", no limit",
    }
    if let Some(why) = &f.trouble {
        out += &format!("; {why}");
    }
    out
}

/// Columns as wide as their widest word; the first and the last to the left, figures to the right.
fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width =
        |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let mut out = String::new();
    for row in rows {
        let cells =
            row.iter().zip(widths).enumerate().map(|(column, (cell, width))| match column {
                0 => format!("{cell:<width$}"),
                _ if column == N - 1 => cell.clone(),
                _ => format!("{cell:>width$}"),
            });
        out += &cells.collect::<Vec<_>>().join("  ");
        out.push('\n');
    }
    out
}
