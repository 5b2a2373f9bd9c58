//! Equal pages of machines in several processes: who has an equal elsewhere is found here, and when it is time to
//! merge. The looking and the advising is theirs.
//!
//! ```text
//!   a pass: each process looks at what became quiet, advises what is worth it, tells a sample of hashes
//!           ▲                                                                 │
//!           └──────────────── which of them others have, too ─────────────────┘
//!   a burst, when enough is new: one process has the kernel merge what all have advised
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ferry_overcommit::Plan;
use ferry_sharing::{Between, Fingerprints, Tenant, Twins, best_tenant, estimate};
use indicatif::HumanBytes;
use serde::Serialize;

use crate::Failure;
use crate::protocol::{Reply, Request, ShareInfo, ShareRequest};
use crate::runtime_dir::RuntimeDir;
use crate::vm::{exchange, info, unexpected};

/// How long until the next pass, while there is much that is new, and while there is nothing.
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(32);
/// One in so many pages is not much.
const FEW: u64 = 64;
/// Merging reads as writing: for so many passes after it, what was merged is not looked at. And before it, what is
/// new is merged after so many, though there is still more.
const PASSES_A_BURST: u32 = 4;
/// By hand: a page that was written is looked at when it was not written for so long twice.
const BY_HAND: Duration = Duration::from_millis(300);
/// Equal pages are found in the third pass and known to the others in the fourth.
const LEAST_PASSES: u32 = 5;
const MOST_PASSES: u32 = 10;
/// A tenant's machines must gain this much more before others' pages are merged in the place of theirs.
const CHANGE_TENANT_PERCENT: u64 = 100;

/// What is known of one machine.
struct Member {
    info: ShareInfo,
    /// What of it is merged.
    merged_pages: u64,
    prints: Fingerprints,
    /// What it was last told of others, and what it is to be told.
    told: Twins,
    twins: Twins,
}

/// The machines that share pages, and what is known of them.
struct Group {
    runtime: RuntimeDir,
    /// None: as each machine has it.
    between: Option<Between>,
    members: BTreeMap<String, Member>,
    /// Whose pages are merged, where there are several tenants.
    first: Option<Tenant>,
    /// Passes since the last burst.
    passes: u32,
    /// What the last burst was for, and what of that the kernel left, in pages: there is no use in trying again.
    expected: Option<u64>,
    left: u64,
}

/// Machines, and whose they are.
type Wanted = BTreeMap<String, Option<Tenant>>;

impl Group {
    fn new(runtime: RuntimeDir, between: Option<Between>) -> Self {
        let members = BTreeMap::new();
        Self { runtime, between, members, first: None, passes: 0, expected: None, left: 0 }
    }

    fn ask(
        &self,
        name: &str,
        request: ShareRequest,
    ) -> Result<crate::protocol::ShareReply, Failure> {
        let between_tenants = self.between.map(|between| between == Between::AllTenants);
        let request = ShareRequest { between_tenants, first: self.first.clone(), ..request };
        match exchange(&self.runtime, name, &Request::Share(Box::new(request)))? {
            Reply::Shared(reply) => Ok(*reply),
            other => Err(unexpected(&other)),
        }
    }

    /// A pass over all machines of `wanted`; how many pages are new, and what went wrong.
    fn pass(&mut self, wanted: &Wanted) -> (u64, BTreeMap<String, String>) {
        self.members.retain(|name, _| wanted.contains_key(name));
        let (mut new, mut troubles) = (0, BTreeMap::new());
        for (name, tenant) in wanted {
            let known = self.members.remove(name);
            let news = known.as_ref().filter(|m| m.twins != m.told).map(|m| m.twins.clone());
            let request = ShareRequest {
                tenant: tenant.clone(),
                elsewhere: news,
                fingerprints: true,
                ..ShareRequest::default()
            };
            let reply = match self.ask(name, request) {
                Ok(reply) => reply,
                Err(e) => {
                    troubles.insert(name.clone(), e.to_string());
                    continue;
                }
            };
            let equal = |info: &ShareInfo| info.advised_equal_pages;
            let before = known.as_ref().map_or(0, |m| equal(&m.info));
            new += reply.info.scanned_pages + equal(&reply.info).abs_diff(before);
            let twins = known.map_or_else(Twins::default, |m| m.twins);
            let prints = reply.fingerprints.unwrap_or_default();
            let (info, merged_pages) = (reply.info, reply.merged_pages);
            let member = Member { info, merged_pages, prints, told: twins.clone(), twins };
            self.members.insert(name.clone(), member);
        }
        self.compare();
        self.passes += 1;
        if self.passes == 1 {
            let merged: u64 = self.members.values().map(|m| m.merged_pages).sum();
            self.left = self.expected.map_or(0, |expected| expected.saturating_sub(merged));
        }
        (new, troubles)
    }

    /// Finds out who has equals of whose pages.
    fn compare(&mut self) {
        let between = self.between.unwrap_or_default();
        let all: Vec<Fingerprints> = self.members.values().map(|m| m.prints.clone()).collect();
        for (no, member) in self.members.values_mut().enumerate() {
            member.twins = Twins::of(&all, no, between);
        }
        if self.first.is_some() && self.passes < PASSES_A_BURST {
            return;
        }
        let tenants: BTreeSet<&Tenant> = all.iter().map(|prints| &prints.tenant).collect();
        self.first = match between {
            Between::OneTenant if tenants.len() > 1 => {
                best_tenant(&estimate(&all, between), self.first.as_ref(), CHANGE_TENANT_PERCENT)
            }
            _ => None,
        };
    }

    /// Whether some have yet to be told much of others.
    fn has_word(&self) -> bool {
        let much = |m: &Member| m.twins.len().abs_diff(m.told.len()) > m.told.len() / 64;
        self.members.values().any(much)
    }

    fn lasting(&self) -> u64 {
        self.members.values().map(|m| m.info.lasting_pages).sum()
    }

    /// Whether it is time for a burst, after a pass that found `new`.
    fn is_due(&self, new: u64) -> bool {
        let lasting = self.lasting();
        let calm = new < lasting / 8 && !self.has_word();
        let merged: u64 = self.members.values().map(|m| m.merged_pages).sum();
        let unmerged = self.equal().saturating_sub(merged);
        unmerged > self.left + lasting / FEW && (calm || self.passes >= PASSES_A_BURST)
    }

    /// Pages that the kernel is advised of, and that have an equal.
    fn equal(&self) -> u64 {
        let advised = self.members.values().filter(|m| m.info.advised_ranges > 0);
        advised.map(|m| m.info.advised_equal_pages).sum()
    }

    /// Has the kernel merge what is advised. One process wakes it for all; where it cannot, each is told why.
    fn burst(&mut self) {
        let advised = self.members.iter().filter(|(_, m)| m.info.advised_ranges > 0);
        let names: Vec<String> = advised.map(|(name, _)| name.clone()).collect();
        // What is left of one that did not come to rest is for the next.
        self.expected = None;
        let expected = self.equal();
        for name in names {
            let request = ShareRequest { merge: true, ..ShareRequest::default() };
            // Why it is of no use now, the next pass says.
            let Ok(reply) = self.ask(&name, request) else { continue };
            let is_merged = reply.info.why_not.is_none();
            if let Some(member) = self.members.get_mut(&name) {
                member.info = reply.info;
            }
            if is_merged {
                self.expected = self.members[&name].info.at_rest.then_some(expected);
                break;
            }
        }
        self.passes = 0;
    }

    /// What the machines have merged, and what that saves all in all, in bytes.
    fn merged(&self) -> (Vec<String>, u64, u64) {
        let (mut names, mut merged, mut saves) = (Vec::new(), 0, 0);
        for name in self.members.keys() {
            let Ok(info) = info(&self.runtime, name) else { continue };
            if info.merged_bytes + info.merged_zero_bytes > 0 {
                names.push(name.clone());
                merged += info.merged_bytes + info.merged_zero_bytes;
                saves += info.merged_saves_bytes + info.merged_zero_bytes;
            }
        }
        (names, merged, saves)
    }

    /// Why the kernel does not merge, in words, each reason once with whom it is about.
    fn why_not(&self) -> BTreeMap<String, Vec<&str>> {
        let mut reasons: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for (name, member) in &self.members {
            if let Some(words) = why_not(&member.info) {
                reasons.entry(words).or_default().push(name);
            }
        }
        reasons
    }
}

/// Why the kernel does not merge a machine's pages, and what is done instead.
pub(crate) fn why_not(info: &ShareInfo) -> Option<String> {
    let why = info.why_not.as_ref()?;
    let instead = match (info.for_now, info.can_swap) {
        (true, _) => "it is tried again",
        (false, true) => {
            "instead, its pages of zeros are given back, and those never written are swapped first"
        }
        (false, false) => "nothing is done instead: it has no swap (see `ferry memory limit`)",
    };
    Some(format!("{why}; {instead}"))
}

/// Has the machines of a plan share pages, in a thread of its own: merging takes seconds.
pub(crate) struct Sharers {
    wish: Arc<Wish>,
    news: Option<Receiver<String>>,
    runtime: RuntimeDir,
    between: Between,
    tenants: Wanted,
}

/// What the thread is to do.
#[derive(Default)]
struct Wish {
    /// None: end.
    wanted: Mutex<Option<Wanted>>,
    changed: Condvar,
}

impl Drop for Sharers {
    fn drop(&mut self) {
        *self.wish.wanted.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.wish.changed.notify_all();
    }
}

impl Sharers {
    /// Those of `plan`; nothing is done until somebody wants it.
    pub(crate) fn new(runtime: &RuntimeDir, plan: &Plan) -> Self {
        let tenant = |tenant: &Option<String>| Some(Tenant(tenant.clone().unwrap_or_default()));
        let between = match plan.share_between_tenants {
            true => Between::AllTenants,
            false => Between::OneTenant,
        };
        let tenants = plan.machines.iter().map(|m| (m.name.clone(), tenant(&m.tenant))).collect();
        let wish = Arc::default();
        Self { wish, news: None, runtime: runtime.clone(), between, tenants }
    }

    /// None of them, ever: for who does not stay to see it through.
    pub(crate) fn none(&mut self) {
        self.tenants.clear();
    }

    /// From now on, these machines share; the others stay as they are. What is new, in words.
    pub(crate) fn want(&mut self, names: &BTreeSet<&str>) -> Vec<String> {
        let mut wanted = self.tenants.clone();
        wanted.retain(|name, _| names.contains(name.as_str()));
        if self.news.is_none() && !wanted.is_empty() {
            let (tell, news) = channel();
            *self.wish.wanted.lock().unwrap_or_else(PoisonError::into_inner) = Some(Wanted::new());
            let wish = self.wish.clone();
            let group = Group::new(self.runtime.clone(), Some(self.between));
            let thread = std::thread::Builder::new().name("sharing".into());
            // Without it machines do not share; they run.
            match thread.spawn(move || follow(&wish, group, &tell)) {
                Ok(_) => self.news = Some(news),
                Err(e) => return vec![format!("sharing: no thread can be started: {e}")],
            }
        }
        let Some(news) = &self.news else { return Vec::new() };
        let mut now = self.wish.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        if now.as_ref() != Some(&wanted) {
            *now = Some(wanted);
            self.wish.changed.notify_all();
        }
        news.try_iter().collect()
    }
}

/// Does what is wished, until the end is.
fn follow(wish: &Wish, mut group: Group, tell: &Sender<String>) {
    let (mut every, mut said) = (SHORTEST, BTreeSet::new());
    let mut machines = BTreeSet::new();
    let mut saved = 0;
    loop {
        let Some(wanted) = wait(wish, every, &machines) else { return };
        let names: BTreeSet<String> = wanted.keys().cloned().collect();
        if names != machines {
            (machines, every) = (names, SHORTEST);
        }
        if machines.is_empty() {
            continue;
        }
        let (new, troubles) = group.pass(&wanted);
        let mut merged = false;
        if group.is_due(new) {
            group.burst();
            merged = true;
        }
        let lasting = group.lasting();
        let changing: u64 = group.members.values().map(|m| m.info.changing_pages).sum();
        every = match new > lasting / FEW || group.has_word() || lasting == 0 && changing > 0 {
            true => SHORTEST,
            false => (every * 2).min(LONGEST),
        };
        let mut words: BTreeSet<String> = troubles
            .iter()
            .map(|(name, why)| format!("sharing: machine `{name}`: {why}"))
            .collect();
        words.extend(
            group
                .why_not()
                .into_iter()
                .map(|(why, of)| format!("sharing: {}: {why}", of.join(", "))),
        );
        // Nobody hears it when the command ends.
        words.difference(&said).for_each(|line| drop(tell.send(line.clone())));
        said = words;
        if merged {
            let (names, bytes, saves) = group.merged();
            if saves.abs_diff(saved) > saved / 16 {
                saved = saves;
                let line = merged_words(&names, bytes, saves);
                let _ = tell.send(format!("sharing: {line}"));
            }
        }
    }
}

/// Waits until it is time for a pass, or other machines are wanted than `now`; none at the end.
fn wait(wish: &Wish, every: Duration, now: &BTreeSet<String>) -> Option<Wanted> {
    let until = Instant::now() + every;
    let mut wanted = wish.wanted.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let names = wanted.as_ref()?;
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || !names.keys().eq(now) {
            return wanted.clone();
        }
        let waited = wish.changed.wait_timeout(wanted, left);
        wanted = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}

fn merged_words(names: &[String], bytes: u64, saves: u64) -> String {
    match names {
        [] => "nothing is merged".into(),
        names => format!(
            "{} merged of {}; saves {}",
            HumanBytes(bytes),
            names.join(", "),
            HumanBytes(saves)
        ),
    }
}

/// What `memory share --json` prints.
#[derive(Serialize)]
struct Shared<'a> {
    machines: BTreeMap<&'a String, &'a ShareInfo>,
    /// What could not be looked at, and why.
    troubles: BTreeMap<String, String>,
    merged_bytes: u64,
    saves_bytes: u64,
}

pub(crate) fn main(
    runtime: &RuntimeDir,
    names: &[String],
    tenant: Option<&str>,
    json: bool,
) -> Result<ExitCode, Failure> {
    let tenant = tenant.map(|name| Tenant(name.to_owned()));
    let wanted: Wanted = names.iter().map(|name| (name.clone(), tenant.clone())).collect();
    let mut group = Group::new(runtime.clone(), None);
    let mut troubles;
    loop {
        let new;
        (new, troubles) = group.pass(&wanted);
        let settled = new <= group.lasting() / FEW && !group.has_word();
        if settled && group.passes >= LEAST_PASSES
            || group.passes >= MOST_PASSES
            || group.members.is_empty()
        {
            break;
        }
        std::thread::sleep(BY_HAND);
    }
    group.burst();
    let (merged_names, merged_bytes, saves_bytes) = group.merged();
    let machines: BTreeMap<_, _> = group.members.iter().map(|(name, m)| (name, &m.info)).collect();
    let can = group.members.values().all(|m| m.info.why_not.is_none());
    let done = troubles.is_empty() && can;
    if json {
        let shared = Shared { machines, troubles, merged_bytes, saves_bytes };
        println!("{}", serde_json::to_string_pretty(&shared)?);
    } else {
        for (name, info) in machines {
            println!("{name}: {}", line(info));
        }
        println!("{}", merged_words(&merged_names, merged_bytes, saves_bytes));
        for (name, why) in &troubles {
            eprintln!("ferry: machine `{name}`: {why}");
        }
    }
    for (why, of) in group.why_not() {
        eprintln!("ferry: {}: {why}", of.join(", "));
    }
    Ok(if done { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// How the sharing of a machine stands, in a line.
pub(crate) fn line(info: &ShareInfo) -> String {
    let bytes = |pages: u64| HumanBytes(pages * crate::machine::PAGE_BYTES);
    format!(
        "{} last, {} of them zero; worth merging: {}; advised: {}; {} change",
        bytes(info.lasting_pages),
        bytes(info.zero_pages),
        bytes(info.advised_equal_pages),
        HumanBytes(info.advised_ranges << 21),
        bytes(info.changing_pages),
    )
}
