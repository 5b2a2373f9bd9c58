//! `ferry memory report`: how the machines of a host use its memory, and what they save.

use indicatif::HumanBytes;
use serde::Serialize;

use crate::Failure;
use crate::memory::sharing::why_not;
use crate::memory::table;
use crate::protocol::MachineInfo;
use crate::runtime_dir::RuntimeDir;

/// One machine, or all, in bytes.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    /// What the guest sees.
    pub(crate) size: u64,
    /// Its pages in memory.
    pub(crate) resident: u64,
    /// What the guest gave back.
    pub(crate) ballooned: u64,
    /// Its pages that are one with others, or with the kernel's page of zeros.
    pub(crate) shared: u64,
    /// Its pages in pool and file.
    pub(crate) swapped: u64,
    /// What the pool takes.
    pub(crate) pool: u64,
    /// Memory of the host that it uses: what is resident, less what sharing saves, and the pool.
    pub(crate) held: u64,
    /// What balloon, sharing and swap save.
    pub(crate) saved: u64,
    /// Why its equal pages are not merged, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) not_shared: Option<String>,
    /// What is wrong, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) trouble: Option<String>,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    machines: Vec<Row>,
    total: Row,
    /// GiB of machines for each GiB of memory that they use.
    carried_by_1_gib: f64,
}

impl Row {
    pub(crate) fn of(m: &MachineInfo) -> Self {
        let swap = m.swap.clone().unwrap_or_default();
        let ballooned = m.balloon.as_ref().map_or(0, |b| b.ballooned_bytes);
        let saves = m.merged_saves_bytes.min(m.resident_bytes);
        Self {
            name: m.name.clone(),
            size: m.memory_bytes,
            resident: m.resident_bytes,
            ballooned,
            shared: m.merged_bytes + m.merged_zero_bytes,
            swapped: swap.swapped_bytes,
            pool: swap.pool_bytes,
            held: m.resident_bytes - saves + swap.pool_bytes,
            saved: (ballooned + saves + m.merged_zero_bytes + swap.swapped_bytes)
                .saturating_sub(swap.pool_bytes),
            not_shared: m.sharing.as_ref().and_then(why_not),
            trouble: swap.trouble,
        }
    }

    fn add(&mut self, other: &Self) {
        self.size += other.size;
        self.resident += other.resident;
        self.ballooned += other.ballooned;
        self.shared += other.shared;
        self.swapped += other.swapped;
        self.pool += other.pool;
        self.held += other.held;
        self.saved += other.saved;
    }

    fn cells(&self) -> [String; 8] {
        let bytes = |bytes| match bytes {
            0 => "-".to_owned(),
            bytes => HumanBytes(bytes).to_string(),
        };
        let figures = [
            self.size,
            self.resident,
            self.ballooned,
            self.shared,
            self.swapped,
            self.held,
            self.saved,
        ];
        let mut cells = figures.map(bytes).into_iter();
        std::array::from_fn(|column| match column {
            0 => self.name.clone(),
            _ => cells.next().unwrap_or_default(),
        })
    }
}

const HEAD: [&str; 8] =
    ["machine", "size", "resident", "ballooned", "shared", "swapped", "held", "saved"];

fn of_host(runtime: &RuntimeDir) -> Result<Report, Failure> {
    let mut machines = Vec::new();
    let mut total = Row { name: "all".into(), ..Row::default() };
    for name in runtime.names()? {
        // One that ended meanwhile is not reported.
        if let Ok(info) = crate::vm::info(runtime, &name) {
            let row = Row::of(&info);
            total.add(&row);
            machines.push(row);
        }
    }
    let carried_by_1_gib = total.size as f64 / total.held.max(1) as f64;
    Ok(Report { machines, total, carried_by_1_gib })
}

pub(crate) fn main(runtime: &RuntimeDir, json: bool) -> Result<(), Failure> {
    let report = of_host(runtime)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    if report.machines.is_empty() {
        println!("no machine runs here (runtime directory {})", runtime.path().display());
        return Ok(());
    }
    print!("{}", words(&report));
    Ok(())
}

fn words(report: &Report) -> String {
    let mut rows = vec![HEAD.map(str::to_owned)];
    rows.extend(report.machines.iter().map(Row::cells));
    rows.push(report.total.cells());
    let mut out = table(&rows);
    out += &format!(
        "\nheld   memory of this host that it uses: what is resident, less what sharing saves, and its pool ({} in all)\n\
         saved  what balloon, sharing and swap save\n\n\
         1 GiB of this host's memory carries {:.2} GiB of machines.\n",
        HumanBytes(report.total.pool),
        report.carried_by_1_gib,
    );
    for row in &report.machines {
        if let Some(why) = &row.not_shared {
            out += &format!("machine `{}` is not shared: {why}\n", row.name);
        }
        if let Some(why) = &row.trouble {
            out += &format!("machine `{}`: {why}\n", row.name);
        }
    }
    out
}
