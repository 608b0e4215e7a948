//! Request ids: the same id with the same request answers the same operation, whoever is asked
//! and however often. What makes no operation is carried out once, and answered as done after
//! that.

use drover_proto::v1::Operation;
use prost::Message;
use tokio::time::Instant;

use super::errors::{Fault, invalid};
use super::present;
use super::service::{CALL_WAIT, Service};
use crate::model::{OperationId, OperationRecord, RequestRecord, is_request_id};
use crate::store::{Txn, View};
use crate::workflows::begin::Begun;
use crate::workflows::{Context, Refusal, timestamp};

impl Service {
    /// Begins an operation once for each request id. `request` is the request without its id.
    pub(super) async fn begin(
        &self,
        method: &str,
        request_id: &str,
        request: &impl Message,
        mut begin: impl FnMut(&Context<'_>) -> Result<Begun, Refusal>,
    ) -> Result<Operation, Fault> {
        check(request_id)?;
        let digest = digest(method, &request.encode_to_vec());
        let mut begun: Option<OperationId> = None;
        let deadline = Instant::now() + CALL_WAIT;
        let decided = self
            .decide(deadline, |cx, view| {
                // An earlier try of ours may have been committed although it was not heard of.
                let held = begun.as_ref().and_then(|id| view.get::<OperationRecord>(id.as_str()));
                if let Some(held) = held {
                    return Ok((Txn::new(), held.value));
                }
                if let Some(held) = answered(view, request_id, &digest)? {
                    return Ok((Txn::new(), held));
                }
                let Begun { txn, operation } = begin(cx)?;
                // What runs already and is only changed by this does not tell whether it was.
                let is_new = view.get::<OperationRecord>(&operation.id).is_none();
                begun = is_new.then(|| OperationId::trusted(&operation.id));
                Ok((remember(cx, txn, request_id, &digest, &operation.id), operation))
            })
            .await;
        let id = match (decided, begun) {
            (Ok((_, operation)), _) => OperationId::trusted(&operation.id),
            // Perhaps it was written all the same: then that is the answer.
            (Err(Fault::Unknown), Some(id)) => id,
            (Err(fault), _) => return Err(fault),
        };
        let view = self.read().await?;
        let row = view.get::<OperationRecord>(id.as_str()).ok_or(Fault::Unknown)?;
        Ok(present::operation(&row, &view, &self.hub.observed()))
    }
}

/// A call that makes no operation, as far as it tells one from another.
#[derive(Clone)]
pub(super) struct Call {
    request_id: String,
    digest: [u8; 16],
}

impl Call {
    /// `request` is the request without its id.
    pub(super) fn new(
        method: &str,
        request_id: String,
        request: &impl Message,
    ) -> Result<Self, Refusal> {
        check(&request_id)?;
        Ok(Self { digest: digest(method, &request.encode_to_vec()), request_id })
    }

    /// Whether it was carried out.
    pub(super) fn is_done(&self, view: &View) -> Result<bool, Refusal> {
        Ok(known(view, &self.request_id, &self.digest)?.is_some())
    }
}

impl Service {
    /// Carries a call out, if it has not been.
    pub(super) async fn once(
        &self,
        call: &Call,
        mut decide: impl FnMut(&Context<'_>) -> Result<Txn, Refusal>,
    ) -> Result<(), Fault> {
        let decided = self
            .decide(Instant::now() + CALL_WAIT, |cx, view| {
                if call.is_done(view)? {
                    return Ok((Txn::new(), ()));
                }
                Ok((remember(cx, decide(cx)?, &call.request_id, &call.digest, ""), ()))
            })
            .await;
        match decided {
            // Perhaps it was written all the same.
            Err(Fault::Unknown) if call.is_done(&self.read().await?)? => Ok(()),
            decided => decided.map(|_| ()),
        }
    }
}

/// The transaction is that of this request.
fn remember(cx: &Context<'_>, txn: Txn, request_id: &str, digest: &[u8], operation: &str) -> Txn {
    if request_id.is_empty() {
        return txn;
    }
    let row = RequestRecord {
        id: request_id.to_owned(),
        digest: digest.to_vec().into(),
        operation: operation.to_owned(),
        time: Some(timestamp(cx.now.wall_ms)),
    };
    txn.absent::<RequestRecord>(request_id).put(&row)
}

/// What was carried out under this id, which must have been the same.
fn known(view: &View, request_id: &str, digest: &[u8]) -> Result<Option<RequestRecord>, Refusal> {
    if request_id.is_empty() {
        return Ok(None);
    }
    let Some(row) = view.get::<RequestRecord>(request_id) else { return Ok(None) };
    if row.value.digest != digest {
        let expected = "a new UUID: this one was used for another request";
        return Err(invalid("request_id", request_id, expected));
    }
    Ok(Some(row.value))
}

fn check(request_id: &str) -> Result<(), Refusal> {
    if request_id.is_empty() || is_request_id(request_id) {
        return Ok(());
    }
    Err(invalid("request_id", request_id, "a UUID in lower case, or nothing"))
}

fn answered(
    view: &View,
    request_id: &str,
    digest: &[u8],
) -> Result<Option<OperationRecord>, Refusal> {
    let Some(row) = known(view, request_id, digest)? else { return Ok(None) };
    match view.get::<OperationRecord>(&row.operation) {
        Some(operation) => Ok(Some(operation.value)),
        None => Err(Refusal::Precondition {
            subject: format!("operations/{}", row.operation),
            reason: "REQUEST_DONE",
            message: format!(
                "request_id: it was accepted as operations/{}, which has ended and is no longer \
                 kept: look at the resource",
                row.operation
            ),
        }),
    }
}

/// FNV-1a, 128 bits: it tells a caller's mistake, and keeps nobody out.
fn digest(method: &str, request: &[u8]) -> [u8; 16] {
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let bytes = method.bytes().chain([0]).chain(request.iter().copied());
    bytes.fold(BASIS, |hash, byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME)).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::State;

    const ID: &str = "11111111-2222-4333-8444-555555555555";

    #[test]
    fn a_request_whose_operation_is_no_longer_kept_is_not_carried_out_again() {
        let digest = digest("CreateDomain", b"web");
        let request = RequestRecord {
            id: ID.into(),
            digest: digest.to_vec().into(),
            operation: "op".into(),
            ..RequestRecord::default()
        };
        let operation = OperationRecord { id: "op".into(), ..OperationRecord::default() };
        let mut state = State::default();
        state.apply(1, &Txn::new().put(&request).put(&operation), |_, _| {});
        let view = View::from(state.clone());
        assert_eq!(answered(&view, ID, &digest).unwrap(), Some(operation));
        assert_eq!(answered(&view, "", &digest).unwrap(), None);

        state.apply(1, &Txn::new().delete::<OperationRecord>("op"), |_, _| {});
        let view = View::from(state);
        let refusal = answered(&view, ID, &digest).unwrap_err();
        assert!(matches!(refusal, Refusal::Precondition { reason: "REQUEST_DONE", .. }));
        assert!(refusal.to_string().starts_with("request_id: "), "{refusal}");
        assert!(refusal.to_string().contains("operations/op"), "{refusal}");
        let other = answered(&view, ID, b"another request").unwrap_err();
        assert!(matches!(other, Refusal::Invalid { .. }));
    }
}
