//! The life of a call that is answered in one pass: embeddings, reranking, classification.
//!
//!     Call --replica--> tokens --reserve--> encode --all texts done--> Encoded; settled, logged
//!
//! Up to the answer everything that goes wrong is an ordinary error and costs nothing. A caller that leaves drops the
//! receiver, which is what cancels the work.

use std::sync::Arc;
use std::time::Instant;

use tokio::time::timeout_at;

use crate::base::{Error, Kind, Neurons, Result};
use crate::engine::Coming;
use crate::engine::oneshot::Encode;
use crate::gateway::delivery::{self, Close};
use crate::gateway::{Call, DEADLINE_GRACE, Gateway, INLINE_PROMPT_BYTES, Lost, choose, route};
use crate::model::encoder::{EncoderText, Tokens};
use crate::supervisor::Replica;
use crate::task::{EncodeInput, Passage, Pooling, Usage, Want};

/// What a call that embeds or classifies comes back with.
#[derive(Debug, Clone)]
pub struct Encoded {
    /// `[passages, width]`: vectors of length 1, scores, or probabilities.
    pub numbers: Vec<f32>,
    /// Numbers for each passage.
    pub width: usize,
    /// What the numbers of a classifier stand for.
    pub labels: Option<Arc<[String]>>,
    /// How vectors were pooled.
    pub pooling: Pooling,
    /// What it used.
    pub usage: Usage,
    /// What it cost.
    pub neurons: Neurons,
}

impl Gateway {
    /// Runs one call to its end.
    ///
    /// # Errors
    /// Whatever stops the call before it answers; nothing is charged then.
    pub async fn encode(&self, call: Call<Arc<EncodeInput>>) -> Result<Encoded> {
        let deadline = call.received + self.config.get().server.request_timeout;
        let mut lost = Lost::default();
        for _ in 0..route::ATTEMPTS {
            let replica = match self.encoder(&call, &lost) {
                Some(replica) => replica,
                None => return Err(lost.error.unwrap_or_else(|| self.absent(&call.entry.id))),
            };
            let coming = replica.engine.expect();
            match self.attempt_encode(&call, &replica, coming, deadline, &lost).await {
                Err(error) if route::is_worth_another(error.kind()) => lost.note(replica.slot, error),
                outcome => return outcome,
            }
        }
        Err(lost.error.unwrap_or_else(|| Error::internal("The call was not tried.")))
    }

    fn encoder(&self, call: &Call<Arc<EncodeInput>>, lost: &Lost) -> Option<Replica<Arc<EncoderText>>> {
        let fleet = self.fleet.get();
        // No cache to meet again: a session is served like anybody.
        choose(fleet.encoders.get(&call.entry.id)?, lost, None, &call.account).cloned()
    }

    async fn attempt_encode(
        &self,
        call: &Call<Arc<EncodeInput>>,
        replica: &Replica<Arc<EncoderText>>,
        coming: Coming,
        deadline: Instant,
        lost: &Lost,
    ) -> Result<Encoded> {
        if call.reject_if_busy && replica.metrics.queue.get() > 0 {
            return Err(Error::new(Kind::Busy, "Capacity temporarily exceeded, please try again.")
                .with_retry_after(std::time::Duration::from_secs(1)));
        }
        suits(call.input.want, &replica.text)?;
        let truncate = call.input.truncate.unwrap_or(call.entry.truncate);
        let texts = tokenize(&call.input, replica, truncate).await?;
        let tokens: usize = texts.iter().map(|text| text.ids.len()).sum();
        let usage = Usage { prompt_tokens: tokens as u32, ..Usage::default() };
        let mut close = Close::new(self, call, self.hold(call, &usage, !lost.slots.is_empty()).await?);

        let pooling = match call.input.want {
            Want::Vectors(pooling) => pooling.unwrap_or(call.entry.pooling),
            Want::Scores | Want::Labels => Pooling::Cls,
        };
        let (sender, answer) = flume::bounded(1);
        let sent = replica.engine.encode(Encode {
            request: call.id,
            account: call.account.clone(),
            slot: replica.slot,
            texts,
            pooling,
            deadline,
            received: call.received,
            answer: sender,
        });
        drop(coming);
        let patience = tokio::time::Instant::from_std(deadline + DEADLINE_GRACE);
        let answered = match sent {
            Err(error) => Err(error),
            Ok(()) => match timeout_at(patience, answer.recv_async()).await {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(_)) => Err(delivery::engine_lost()),
                Err(_) => Err(delivery::too_late()),
            },
        };
        let mut numbers = match answered {
            Ok(numbers) => numbers,
            Err(error) => {
                close.release();
                return Err(error);
            }
        };
        let neurons = close.done(usage);
        let width = replica.text.width() as usize;
        match call.input.want {
            Want::Vectors(_) => {}
            Want::Scores => numbers.iter_mut().for_each(|logit| *logit = 1.0 / (1.0 + (-*logit).exp())),
            Want::Labels => numbers.chunks_exact_mut(width.max(1)).for_each(softmax),
        }
        let labels = replica.text.labels().cloned();
        Ok(Encoded { numbers, width, labels, pooling, usage, neurons })
    }
}

/// A reranker scores pairs, a classifier names texts, an encoder embeds; who asks for another is told what to send.
fn suits(want: Want, text: &EncoderText) -> Result<()> {
    let labels = text.labels().map(|labels| labels.len());
    let missing = |names: &str| Err(Error::bad_input(format!("required properties at '/' are {names}")));
    match (want, labels) {
        (Want::Vectors(_), None) | (Want::Scores, Some(1)) | (Want::Labels, Some(2..)) => Ok(()),
        (Want::Labels, Some(_)) => missing("'query', 'contexts'"),
        (Want::Scores, Some(_)) => missing("'text'"),
        (_, _) => Err(Error::internal("a model of another task than its entry's")),
    }
}

async fn tokenize(
    input: &Arc<EncodeInput>,
    replica: &Replica<Arc<EncoderText>>,
    truncate: bool,
) -> Result<Vec<Tokens>> {
    let bytes = |passage: &Passage| match passage {
        Passage::Text(text) => text.len(),
        Passage::Pair(first, second) => first.len() + second.len(),
        Passage::Tokens(_) => 0,
    };
    let (input, text, most) = (input.clone(), replica.text.clone(), replica.context as usize);
    let inline = input.passages.iter().map(bytes).sum::<usize>() <= INLINE_PROMPT_BYTES;
    let work = move || input.passages.iter().map(|passage| text.tokens(passage, most, truncate)).collect();
    if inline {
        return work();
    }
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::internal("The texts could not be tokenised.").with_source(error))?
}

fn softmax(logits: &mut [f32]) {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter_mut().for_each(|logit| *logit = (*logit - largest).exp());
    let sum: f32 = logits.iter().sum();
    logits.iter_mut().for_each(|weight| *weight /= sum);
}
