//! The real state machines as tables that fill while the checker walks.
//!
//! Neither machine can be cloned, as a [`RunPermit`] cannot. So a machine's state is known by the
//! fingerprint of its `Debug` text, which shows every field, and is kept as the events that lead to it. The first
//! time that an event meets a state, a new machine is made, fed these events and then this one; what it did is
//! looked up from then on. A permit comes into a machine as it does over the wire: out of its bytes.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, PoisonError, RwLock};

use ferry_pages::{PageSet, Run};
use ferry_protocol::{RunPermit, wire};
use serde::{Serialize, de::DeserializeOwned};

/// Pages as bits.
pub(crate) type Mask = u8;
/// A state of one machine: the fingerprint of its text.
pub(crate) type Id = u64;
/// A message, by its bytes.
pub(crate) type MessageId = u64;

/// A machine as it is driven here.
pub(crate) trait Machine: Sized {
    type Event: Copy + Eq + Hash + Debug;
    type Action: Clone + Debug;
    /// How a machine begins, beside a new one.
    type Origin: Copy + Debug;

    fn begin(origin: Self::Origin, table: &Table<Self>) -> Self;
    /// Takes an event, and all that it then wants done.
    fn feed(&mut self, event: Self::Event, wire: &Wire) -> Vec<Self::Action>;
    /// All that its future depends on, as text.
    fn text(&self) -> String;
    fn facts(&self) -> Facts;
}

/// What the checks ask about a state.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Facts {
    /// The phase's name.
    pub(crate) phase: &'static str,
    pub(crate) has_permit: bool,
    pub(crate) has_stub: bool,
    pub(crate) has_deadline: bool,
    /// What a source that asks is told, of a destination.
    pub(crate) verdict: Option<ferry_protocol::Verdict>,
}

/// What one event does to one state.
pub(crate) struct Step<M: Machine> {
    pub(crate) next: Id,
    pub(crate) actions: Vec<M::Action>,
}

struct Node<M: Machine> {
    origin: M::Origin,
    events: Vec<M::Event>,
    facts: Facts,
}

type Steps<M> = HashMap<(Id, <M as Machine>::Event), Arc<Step<M>>>;

/// All states of one kind of machine that were met.
pub(crate) struct Table<M: Machine> {
    pub(crate) wire: Arc<Wire>,
    nodes: RwLock<HashMap<Id, Arc<Node<M>>>>,
    steps: RwLock<Steps<M>>,
}

fn hash(of: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

impl<M: Machine> Table<M> {
    pub(crate) fn new(wire: Arc<Wire>) -> Self {
        Self { wire, nodes: RwLock::default(), steps: RwLock::default() }
    }

    /// States met.
    pub(crate) fn len(&self) -> usize {
        self.nodes.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn node(&self, id: Id) -> Arc<Node<M>> {
        self.nodes.read().unwrap_or_else(PoisonError::into_inner)[&id].clone()
    }

    pub(crate) fn facts(&self, id: Id) -> Facts {
        self.node(id).facts
    }

    /// A machine in state `id`, and what its last event made it do.
    pub(crate) fn replay(&self, id: Id) -> (M, Vec<M::Action>) {
        let node = self.node(id);
        let mut machine = M::begin(node.origin, self);
        let mut last = Vec::new();
        for event in &node.events {
            last = machine.feed(*event, &self.wire);
        }
        (machine, last)
    }

    fn note(&self, machine: &M, origin: M::Origin, events: Vec<M::Event>) -> Id {
        let id = hash(&machine.text());
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        let facts = machine.facts();
        nodes.entry(id).or_insert_with(|| Arc::new(Node { origin, events, facts }));
        id
    }

    /// A machine that begins.
    pub(crate) fn begin(&self, origin: M::Origin) -> Id {
        self.note(&M::begin(origin, self), origin, Vec::new())
    }

    /// What `event` does to a machine in state `id`.
    pub(crate) fn step(&self, id: Id, event: M::Event) -> Arc<Step<M>> {
        let known = self.steps.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(step) = known.get(&(id, event)) {
            return step.clone();
        }
        drop(known);
        let (mut machine, _) = self.replay(id);
        let actions = machine.feed(event, &self.wire);
        let node = self.node(id);
        let mut events = node.events.clone();
        events.push(event);
        let next = self.note(&machine, node.origin, events);
        let step = Arc::new(Step { next, actions });
        let mut steps = self.steps.write().unwrap_or_else(PoisonError::into_inner);
        steps.insert((id, event), step.clone());
        step
    }
}

/// Every message that was ever sent, as bytes.
#[derive(Default)]
pub(crate) struct Wire(RwLock<HashMap<MessageId, Vec<u8>>>);

impl Wire {
    pub(crate) fn put(&self, message: &impl Serialize) -> MessageId {
        let bytes = wire::encode(message).expect("a message fits");
        let id = hash(&bytes);
        self.0.write().unwrap_or_else(PoisonError::into_inner).entry(id).or_insert(bytes);
        id
    }

    pub(crate) fn get<T: DeserializeOwned>(&self, id: MessageId) -> T {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        wire::decode(&all[&id]).expect("what was sent can be read")
    }
}

/// The machine's number.
pub(crate) const MACHINE: u128 = 1;

/// The permit after so many hand-overs, out of the bytes that it travels as.
pub(crate) fn permit(handovers: u8) -> RunPermit {
    let bytes = wire::encode(&(MACHINE, u64::from(handovers))).expect("two numbers fit");
    wire::decode(&bytes).expect("a permit is two numbers")
}

pub(crate) fn pages(mask: Mask) -> PageSet {
    (0..8).filter(|page| mask >> page & 1 == 1).map(|page| Run::new(page, 1)).collect()
}

pub(crate) fn mask(pages: &PageSet) -> Mask {
    (0..8).filter(|page| pages.contains(*page)).fold(0, |mask, page| mask | 1 << page)
}

/// `text` with words for people left out: nothing depends on them.
pub(crate) fn without_words(text: &str) -> String {
    let (mut out, mut quoted, mut escaped) = (String::with_capacity(text.len()), false, false);
    for c in text.chars() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            _ if quoted => {}
            c => out.push(c),
        }
    }
    out
}

/// The value of the first field `name` in a `Debug` text, and where it begins and ends.
pub(crate) fn field<'a>(text: &'a str, name: &str) -> Option<(&'a str, std::ops::Range<usize>)> {
    let key = format!(" {name}: ");
    let begin = text.find(&key)? + key.len();
    let mut depth = 0;
    for (at, c) in text[begin..].char_indices() {
        match c {
            '{' | '(' | '[' => depth += 1,
            ',' if depth == 0 => return Some((&text[begin..begin + at], begin..begin + at)),
            '}' | ')' | ']' if depth == 0 => {
                return Some((text[begin..begin + at].trim_end(), begin..begin + at));
            }
            '}' | ')' | ']' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// A `Duration` as its `Debug` writes it.
pub(crate) fn duration(text: &str) -> Option<std::time::Duration> {
    let unit = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let number: f64 = text[..unit].parse().ok()?;
    let scale = match &text[unit..] {
        "ns" => 1e-9,
        "µs" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        _ => return None,
    };
    std::time::Duration::try_from_secs_f64(number * scale).ok()
}
