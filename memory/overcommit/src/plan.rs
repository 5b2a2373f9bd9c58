//! A plan: one host and its machines, from a TOML file. `example.toml` beside this crate shows every key.

use std::path::PathBuf;

use serde::Deserialize;
use toml::Spanned;

use crate::admit::Refusal;
use crate::machine::{Host, Machine, Tax};
use crate::{Size, admit};

/// What a plan's file says.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The host.
    pub host: Host,
    /// Where pages go; none: they are not swapped.
    pub swap: Option<Swap>,
    /// Whether pages of different tenants may be merged.
    pub share_between_tenants: bool,
    /// Its machines, at least one; each is sound by itself, and no two have one name.
    pub machines: Vec<Machine>,
}

/// Where swapped pages go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Swap {
    /// Where files are made.
    pub dir: PathBuf,
    /// Most that all files take, in bytes.
    pub size_bytes: u64,
    /// Most memory that compressed pages of all machines take, in bytes.
    pub pool_bytes: u64,
}

/// Why a text is no plan: where, what, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum BadPlan {
    /// a word that TOML does not know, or a plan
    #[error("{0}")]
    Toml(#[from] toml::de::Error),
    /// a figure that makes no sense
    #[error("line {line}: {what}")]
    Figure {
        /// Where its table begins, from 1.
        line: usize,
        /// What is wrong, and what to do.
        what: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    host: Spanned<HostTable>,
    swap: Option<Spanned<SwapTable>>,
    machine: Vec<Spanned<MachineTable>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HostTable {
    budget: Size,
    headroom: Option<Size>,
    overhead: Option<Size>,
    tax: Option<f64>,
    #[serde(default)]
    share_between_tenants: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SwapTable {
    dir: PathBuf,
    size: Size,
    pool: Option<Size>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MachineTable {
    name: String,
    size: Size,
    #[serde(default)]
    reservation: Size,
    limit: Option<Size>,
    shares: Option<u32>,
    tenant: Option<String>,
    balloon: Option<bool>,
    swap: Option<bool>,
    share: Option<bool>,
}

impl Plan {
    /// Reads a plan. Whether the host can hold it is another question: [`hold`](crate::hold).
    ///
    /// # Errors
    /// The line, the key, and what to do.
    pub fn parse(text: &str) -> Result<Self, BadPlan> {
        let file: File = toml::from_str(text)?;
        let bad = |at: usize, what: String| {
            let before = text.as_bytes().get(..at).unwrap_or_default();
            let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
            Err(BadPlan::Figure { line, what })
        };
        let at = file.host.span().start;
        let table = file.host.into_inner();
        let mut host = Host::new(table.budget.0);
        host.headroom_bytes = table.headroom.map_or(host.headroom_bytes, |size| size.0);
        host.overhead_bytes = table.overhead.map_or(host.overhead_bytes, |size| size.0);
        if let Some(tax) = table.tax {
            let Some(parsed) = tax_permille(tax) else {
                return bad(
                    at,
                    format!("`tax` is {tax}: give a number from 0 to 0.99, such as 0.75"),
                );
            };
            host.tax = parsed;
        }
        if let Err(e) = admit::hold(&host, &[]) {
            return bad(at, format!("host: {e}"));
        }
        let swap = match file.swap {
            None => None,
            Some(swap) => {
                let at = swap.span().start;
                let SwapTable { dir, size, pool } = swap.into_inner();
                let pool = pool.map_or(host.budget_bytes / 8, |size| size.0);
                if pool >= host.usable_bytes(0) {
                    let (pool, budget) = (Size(pool), Size(host.budget_bytes));
                    return bad(
                        at,
                        format!(
                            "`pool` ({pool}) is a part of the budget ({budget}) and leaves nothing of it for pages in use: \
                             lower it"
                        ),
                    );
                }
                host.swap_bytes = size.0;
                Some(Swap { dir, size_bytes: size.0, pool_bytes: pool })
            }
        };
        let mut machines: Vec<Machine> = Vec::new();
        for table in file.machine {
            let at = table.span().start;
            let machine = table.into_inner().machine(swap.is_some());
            if let Err(e) = machine.check() {
                return bad(at, e.to_string());
            }
            if machines.iter().any(|other| other.name == machine.name) {
                return bad(at, Refusal::Twice(machine.name).to_string());
            }
            machines.push(machine);
        }
        if machines.is_empty() {
            return bad(
                at,
                "no machine: write a table `[[machine]]` with `name` and `size`".into(),
            );
        }
        Ok(Self { host, swap, share_between_tenants: table.share_between_tenants, machines })
    }
}

impl MachineTable {
    fn machine(self, can_be_swapped: bool) -> Machine {
        let usual = Machine::new(self.name, self.size.0);
        Machine {
            reservation_bytes: self.reservation.0,
            limit_bytes: self.limit.map_or(usual.limit_bytes, |size| size.0),
            shares: self.shares.unwrap_or(usual.shares),
            tenant: self.tenant,
            can_balloon: self.balloon.unwrap_or(usual.can_balloon),
            can_swap: self.swap.unwrap_or(can_be_swapped),
            can_share: self.share.unwrap_or(usual.can_share),
            ..usual
        }
    }
}

fn tax_permille(tax: f64) -> Option<Tax> {
    // Found rather than cast: there are a thousand.
    let permille = (0..=990_u16).min_by(|a, b| {
        let off = |permille: &u16| (f64::from(*permille) / 1000.0 - tax).abs();
        off(a).total_cmp(&off(b))
    })?;
    (0.0..=0.99).contains(&tax).then(|| Tax::permille(permille))?
}
