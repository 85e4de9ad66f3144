//! The life of a call, whatever surface it came through. This file serves calls of models in this process; `relay.rs` those
//! that go through a gateway, to anybody.
//!
//!     Call --replica--> tokens --reserve--> submit --first event--> Delivery --Done | Failed | Drop--> settled, logged
//!
//! Up to the first event everything that goes wrong is an ordinary error; afterwards the answer has begun and the
//! [`Delivery`] carries on alone.

pub mod asked;
pub mod bill;
pub mod counts;
pub mod headers;
pub mod hold;
pub mod limits;
pub mod opening;
pub mod options;
pub mod pipe;
pub mod record;
pub mod relay;
pub mod route;
pub mod step;
pub mod watch;

mod call;
mod calls;
mod delivery;
mod encode;

pub use call::{Call, Terms};
pub use delivery::{Answer, Choice, Delivery};
pub use encode::Encoded;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout_at;

use crate::adapters::Adapters;
use crate::base::{AccountId, Error, Kind, ModelId, Neurons, Result, SlotId};
use crate::config::Live;
use crate::engine::{Coming, Submit};
use crate::gateway::calls::Calls;
use crate::gateway::delivery::Begun;
use crate::gateway::route::Candidate;
use crate::ledger::Ledger;
use crate::logs::Logs;
use crate::metrics::Metrics;
use crate::model::lora::Adapter;
use crate::model::text::TextModel;
use crate::model::tools::ToolFormat;
use crate::supervisor::{FleetView, Replica};
use crate::task::{Event, Grammar, Prompt, TextInput, Tools, Usage};

/// Prompts longer than this are tokenised on a blocking thread, so that a book does not hold up a worker.
const INLINE_PROMPT_BYTES: usize = 4 * 1024;
/// Most log-probabilities of a prompt, rivals included: some 16 MiB.
const MAX_PROMPT_LOGPROBS: usize = 1 << 18;
/// How long past its deadline a call waits for the engine to say so itself.
const DEADLINE_GRACE: Duration = Duration::from_secs(2);

/// Serves calls. Cheap to clone; one for the whole process.
#[derive(Clone)]
pub struct Gateway {
    /// Configuration in force.
    pub config: Live,
    /// What is loaded.
    pub fleet: FleetView,
    /// Adapters that accounts bring.
    pub adapters: Adapters,
    /// Who used what.
    pub ledger: Ledger,
    /// What is told of calls.
    pub logs: Logs,
    /// Where to count.
    pub metrics: Arc<Metrics>,
}

impl Gateway {
    /// Runs one call up to its first event, which is the point of no return.
    ///
    /// # Errors
    /// Whatever stops the call before it answers; nothing is charged then.
    pub async fn serve(&self, call: Call) -> Result<Delivery> {
        let deadline = call.received + self.config.get().server.request_timeout;
        let mut lost = Lost::default();
        for _ in 0..route::ATTEMPTS {
            let replica = match self.replica(&call, &lost) {
                Some(replica) => replica,
                None => return Err(lost.error.unwrap_or_else(|| self.absent(&call.entry.id))),
            };
            // Prompts are read before they are sent: who comes meanwhile is to see that somebody is on the way.
            let coming = replica.engine.expect();
            match self.attempt(&call, &replica, coming, deadline, &lost).await {
                Err(error) if route::is_worth_another(error.kind()) => lost.note(replica.slot, error),
                outcome => return outcome,
            }
        }
        Err(lost.error.unwrap_or_else(|| Error::internal("The call was not tried.")))
    }

    /// The replica that answers.
    fn replica(&self, call: &Call, lost: &Lost) -> Option<Replica> {
        let fleet = self.fleet.get();
        let affinity = call.affinity.as_ref().map(|session| route::affinity(session, &call.account));
        choose(fleet.models.get(&call.entry.id)?, lost, affinity, &call.account).cloned()
    }

    /// Why nobody answers for a model of the catalog.
    fn absent(&self, id: &ModelId) -> Error {
        let configured = self.config.get().models.iter().any(|model| model.id == *id);
        if configured {
            Error::new(Kind::ModelUnavailable, format!("{id} is not ready yet; try again in a moment."))
                .with_retry_after(Duration::from_secs(5))
        } else {
            Error::new(Kind::NoSuchModel, format!("{id} is in the catalog but not loaded on this server."))
        }
    }

    /// The account's share of a busy device, and how urgent the call may be.
    fn standing(&self, call: &Call) -> (u32, i8) {
        let config = self.config.get();
        let account = config.accounts.iter().find(|account| account.id == call.account);
        let (weight, most) = account.map_or((1, 0), |account| (account.weight, account.priority));
        (weight, call.input.priority.min(most))
    }

    async fn attempt(
        &self,
        call: &Call,
        replica: &Replica,
        coming: Coming,
        deadline: Instant,
        lost: &Lost,
    ) -> Result<Delivery> {
        if call.reject_if_busy && replica.metrics.queue.get() > 0 {
            return Err(Error::new(Kind::Busy, "Capacity temporarily exceeded, please try again.")
                .with_retry_after(Duration::from_secs(1)));
        }
        let (prompt, expected) = tokenize(call, replica).await?;
        let max_tokens = budget(call, replica, prompt.len())?;
        let tools = call.input.shown_tools().zip(replica.text.tool_format());
        let grammar = match grammar(&call.input, tools)? {
            Some(grammar) => Some(replica.text.grammars().compile(&grammar, &replica.metrics).await?),
            None => None,
        };
        check_prompt_logprobs(call, prompt.len())?;

        let adapter = self.adapter(call, replica).await?;

        let most = Usage {
            prompt_tokens: prompt.len() as u32,
            completion_tokens: max_tokens.saturating_mul(call.input.choices),
            ..Usage::default()
        };
        let reservation = self.hold(call, &most, !lost.slots.is_empty()).await?;
        let granted = reservation.granted().and_then(|granted| affordable(call, &most, granted));
        let max_tokens = granted.map_or(max_tokens, |tokens| tokens.min(max_tokens));
        if max_tokens == 0 && call.input.max_tokens != Some(0) {
            let message = "what is left of today's neurons, or of this token's budget, does not pay for this prompt";
            return Err(Error::new(Kind::OutOfNeurons, message));
        }

        let (weight, priority) = self.standing(call);
        let echo = call.input.echo.then(|| echo(replica, &prompt));
        let calls = tools.map(|(tools, format)| Calls::new(format, tools, call.input.choices, call.id.low_bits()));
        let (sender, events) = flume::bounded(Submit::event_capacity(call.input.choices, max_tokens));
        replica.engine.submit(Submit {
            request: call.id,
            account: call.account.clone(),
            weight,
            slot: replica.slot,
            prompt,
            choices: call.input.choices,
            max_tokens,
            sampling: call.input.sampling.clone(),
            seed: call.input.sampling.seed.unwrap_or_else(|| call.id.low_bits()),
            stop: call.input.stop.clone(),
            logprobs: call.input.logprobs,
            grammar,
            prompt_logprobs: call.input.prompt_logprobs,
            priority,
            cache_salt: route::cache_salt(&call.account),
            adapter,
            drafts: call.input.speculation.most,
            expected,
            deadline,
            received: call.received,
            vocabulary: calls.as_ref().and_then(|_| replica.text.vocabulary_with_markers().cloned()),
            events: sender,
        })?;
        drop(coming);

        let patience = tokio::time::Instant::from_std(deadline + DEADLINE_GRACE);
        match timeout_at(patience, events.recv_async()).await {
            Ok(Ok(Event::Failed(error))) => Err(error),
            Ok(Ok(first)) => Ok(Delivery::new(self, call, Begun { events, first, echo, calls }, reservation, patience)),
            Ok(Err(_)) => Err(delivery::engine_lost()),
            Err(_) => Err(delivery::too_late()),
        }
    }

    /// What the call names in `lora`, in memory and fit for this replica.
    async fn adapter(&self, call: &Call, replica: &Replica) -> Result<Option<Arc<Adapter>>> {
        let Some(key) = &call.input.lora else { return Ok(None) };
        let Some(shape) = replica.shape else {
            let message =
                format!("{} cannot compute with LoRA adapters on this server: leave out `lora`.", call.entry.id);
            return Err(Error::unsupported(message).with_param("lora"));
        };
        self.adapters.acquire(&call.account, key, &call.entry.id, shape).await.map(Some)
    }
}

/// Where a call has been in vain. A device that died looks idle until its supervisor has noticed.
#[derive(Default)]
struct Lost {
    slots: Vec<SlotId>,
    /// The last error.
    error: Option<Error>,
}

impl Lost {
    fn note(&mut self, slot: SlotId, error: Error) {
        self.slots.push(slot);
        self.error = Some(error);
    }
}

/// The replica that answers, of those where the call was not lost.
fn choose<'a, Half>(
    replicas: &'a [Replica<Half>],
    lost: &Lost,
    affinity: Option<u64>,
    account: &AccountId,
) -> Option<&'a Replica<Half>> {
    let left: Vec<_> = replicas.iter().filter(|replica| !lost.slots.contains(&replica.slot)).collect();
    let candidates: Vec<_> = left.iter().map(|replica| candidate(replica)).collect();
    Some(left[route::choose(&candidates, affinity, account)?])
}

fn candidate<Half>(replica: &Replica<Half>) -> Candidate {
    let count = |gauge: i64| u64::try_from(gauge).unwrap_or(0);
    let metrics = &replica.metrics;
    // Who is on the way there and is not looked at yet counts as if it ran: a crowd would otherwise go where its first went.
    let running = count(metrics.running.get()) + replica.engine.backlog() as u64;
    Candidate { device: replica.device, waiting: count(metrics.queue.get()), running }
}

/// What the answer must look like: what the caller asked for, and calls where they are forced or promised to be exact.
fn grammar(input: &TextInput, tools: Option<(&Arc<Tools>, &ToolFormat)>) -> Result<Option<Arc<Grammar>>> {
    if let Some((tools, format)) = tools
        && let Some(grammar) = format.grammar(tools, input.grammar.as_deref())?
    {
        return Ok(Some(Arc::new(grammar)));
    }
    Ok(input.grammar.clone())
}

/// The tokens of the prompt, and of the answer that the caller foresees.
async fn tokenize(call: &Call, replica: &Replica) -> Result<(Vec<u32>, Vec<u32>)> {
    let prompt = match &call.input.prompt {
        Prompt::Chat { messages, .. } => {
            // A tool's description and schema are some hundred bytes, and work for the template besides.
            let tools = call.input.shown_tools().map_or(0, |tools| tools.list.len() * 1024);
            tools + messages.iter().map(|message| message.content.len()).sum::<usize>()
        }
        Prompt::Raw(text) => text.len(),
        Prompt::Tokens(_) => 0,
    };
    let both = |text: &TextModel, input: &TextInput| -> Result<_> {
        let foreseen =
            input.speculation.prediction.as_ref().map(|expected| text.encode(expected, false)).transpose()?;
        Ok((text.input_tokens(input)?, foreseen.unwrap_or_default()))
    };
    let foreseen = call.input.speculation.prediction.as_ref().map_or(0, String::len);
    let (tokens, expected) = if prompt + foreseen <= INLINE_PROMPT_BYTES {
        both(&replica.text, &call.input)?
    } else {
        let (text, input) = (replica.text.clone(), call.input.clone());
        tokio::task::spawn_blocking(move || both(&text, &input))
            .await
            .map_err(|error| Error::internal("The prompt could not be tokenised.").with_source(error))??
    };
    if tokens.is_empty() {
        return Err(Error::bad_input("The prompt is empty: send at least one character."));
    }
    Ok((tokens, expected))
}

/// How many tokens each choice may produce: what was asked, which has to fit; or the model's default, cut to what is left.
fn budget(call: &Call, replica: &Replica, prompt: usize) -> Result<u32> {
    let context = replica.context as usize;
    // Reading the prompt ends with a draw, whether anybody wants it or not.
    let wanted = call.input.max_tokens.unwrap_or(call.entry.max_tokens).max(1) as usize;
    let room = context.saturating_sub(prompt);
    if call.input.max_tokens.is_some() && wanted > room || room == 0 {
        let total = prompt + wanted;
        return Err(Error::new(
            Kind::ContextLength,
            format!(
                "The estimated number of input and maximum output tokens ({total}) exceeded this model context window \
                 limit ({context}). The input has {prompt} tokens and up to {wanted} were requested: shorten the input \
                 or ask for fewer."
            ),
        ));
    }
    Ok(wanted.min(room) as u32)
}

/// How many tokens of each choice are paid for, where that is less than was asked.
fn affordable(call: &Call, most: &Usage, granted: Neurons) -> Option<u32> {
    let price = &call.entry.price;
    if granted >= price.charge(most) {
        return None;
    }
    let prompt = price.charge(&Usage { completion_tokens: 0, ..*most });
    let left = granted.saturating_sub(prompt).micro();
    let tokens = left / price.output.max(1) / u64::from(call.input.choices.max(1));
    Some(u32::try_from(tokens).unwrap_or(u32::MAX))
}

/// Log-probabilities of the prompt are held in memory until all are there.
fn check_prompt_logprobs(call: &Call, prompt: usize) -> Result<()> {
    let Some(rivals) = call.input.prompt_logprobs else { return Ok(()) };
    let entries = prompt * (rivals as usize + 1);
    if entries <= MAX_PROMPT_LOGPROBS {
        return Ok(());
    }
    Err(Error::bad_input(format!(
        "{prompt} tokens of the prompt with {rivals} rivals each are {entries} log-probabilities, of which a request may \
         ask for {MAX_PROMPT_LOGPROBS}: ask for fewer rivals, or shorten the prompt."
    )))
}

fn echo(replica: &Replica, prompt: &[u32]) -> String {
    let bytes: Vec<u8> = prompt.iter().flat_map(|&token| replica.text.vocabulary().piece(token)).copied().collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
