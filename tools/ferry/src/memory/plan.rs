//! `ferry memory plan`: whether a host can hold the machines of a plan, and what each gets.

use std::path::Path;
use std::process::ExitCode;

use ferry_overcommit::{Outlook, Plan, Refusal, Size, hold};
use serde::Serialize;

use crate::Failure;
use crate::memory::table;

/// What `memory plan --json` prints.
#[derive(Serialize)]
struct Planned<'a> {
    file: &'a Path,
    /// Whether all can be held whatever the guests do.
    held: bool,
    /// Why not.
    refusal: Option<String>,
    #[serde(flatten)]
    outlook: Outlook,
}

pub(crate) fn main(file: &Path, json: bool) -> Result<ExitCode, Failure> {
    let plan = read(file)?;
    let outlook = Outlook::of(&plan);
    let refusal = hold(&plan.host, &plan.machines).err();
    if json {
        let refusal = refusal.as_ref().map(Refusal::to_string);
        let planned = Planned { file, held: refusal.is_none(), refusal, outlook };
        println!("{}", serde_json::to_string_pretty(&planned)?);
    } else if !matches!(refusal, Some(Refusal::Reserved { .. })) {
        print!("{}", words(&outlook));
        if refusal.is_none() {
            println!("It can be held, whatever the guests do.");
        }
    }
    Ok(match refusal {
        None => ExitCode::SUCCESS,
        Some(e) => {
            eprintln!("ferry: {}: {e}", file.display());
            ExitCode::FAILURE
        }
    })
}

pub(crate) fn read(file: &Path) -> Result<Plan, Failure> {
    let text = std::fs::read_to_string(file).map_err(|e| {
        let file = file.display();
        Failure::words(format!(
            "cannot read the plan {file}: {e}; `ferry memory plan --help` shows one"
        ))
    })?;
    Plan::parse(&text).map_err(|e| Failure::words(format!("{}: {e}", file.display())))
}

fn words(outlook: &Outlook) -> String {
    let size = |bytes| match bytes {
        0 => "-".to_owned(),
        _ => Size(bytes).to_string(),
    };
    let mut rows = vec![
        [
            "machine",
            "size",
            "reserved",
            "limit",
            "shares",
            "all busy",
            "alone busy",
            "alone idle",
            "tenant",
        ]
        .map(str::to_owned),
    ];
    rows.extend(outlook.machines.iter().map(|m| {
        [
            m.name.clone(),
            size(m.size_bytes),
            size(m.reservation_bytes),
            size(m.limit_bytes),
            m.shares.to_string(),
            size(m.all_busy_bytes),
            size(m.alone_busy_bytes),
            size(m.alone_idle_bytes),
            m.tenant.clone().unwrap_or_else(|| "-".into()),
        ]
    }));
    let mut out = table(&rows);
    let overcommit = outlook.sizes_bytes.saturating_mul(100) / outlook.usable_bytes.max(1);
    out += &format!(
        "\nall busy    what it holds when all guests use all of their memory\n\
         alone busy  what it holds when it does, and all others are idle\n\
         alone idle  what it is left with when it is idle, and all others are not\n\n\
         budget      {}, less {} headroom and {} for processes: {} for machines\n\
         machines    {} in all ({}.{:02} times what there is), reserved: {}\n\
         swap file   needed if all guests touch all that they have: {}; given: {}\n",
        size(outlook.budget_bytes),
        size(outlook.headroom_bytes),
        size(outlook.overhead_bytes),
        size(outlook.usable_bytes),
        size(outlook.sizes_bytes),
        overcommit / 100,
        overcommit % 100,
        size(outlook.reserved_bytes),
        size(outlook.swap_needed_bytes),
        size(outlook.swap_bytes),
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan_of(text: &str) -> Result<ExitCode, Failure> {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("plan.toml");
        std::fs::write(&file, text).expect("written");
        main(&file, false)
    }

    #[test]
    fn a_plan_that_cannot_be_held_is_a_failure_and_one_that_can_is_none() {
        let example = include_str!("../../../../memory/overcommit/example.toml");
        assert_eq!(plan_of(example).expect("a plan"), ExitCode::SUCCESS);
        let without = example.replace("size = \"4G\"", "size = \"1G\"");
        assert_eq!(plan_of(&without).expect("a plan"), ExitCode::FAILURE);
        let said = plan_of("host = 1").expect_err("no plan").to_string();
        assert!(said.contains("plan.toml: ") && said.contains("line 1"), "{said}");
        let said = main(Path::new("/nowhere/x"), false).expect_err("no file").to_string();
        assert!(said.contains("/nowhere/x") && said.contains("--help"), "{said}");
    }

    #[test]
    fn a_table_stays_straight_whatever_is_in_it() {
        let rows = [["a", "1", "x"], ["größe", "1000", "-"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(&rows), "a         1  x\ngröße  1000  -\n");
    }
}
