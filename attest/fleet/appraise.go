package fleet

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"sekisho/attest"
	"sekisho/attest/report"
	"sekisho/attest/store"
	"sekisho/attest/verifier"
)

// attempts is how often evidence is appraised anew because the record of its
// device changed meanwhile.
const attempts = 4

// record is what the store says of a device, and in which revisions: 0 if
// there is none.
type record struct {
	device             Device
	seen               Seen
	deviceRev, seenRev int64
}

// record reads the record of a device. A serializable read may be a moment
// old; what was concluded from it is committed only if it still holds.
func (s *Service) record(ctx context.Context, id attest.Digest, serializable bool) (r record, err error) {
	var opts []clientv3.OpOption
	if serializable {
		opts = append(opts, clientv3.WithSerializable())
	}
	resp, err := s.Store.Client().Txn(ctx).Then(
		clientv3.OpGet(s.keys.device(id), opts...), clientv3.OpGet(s.keys.seen(id), opts...)).Commit()
	if err != nil {
		return r, fmt.Errorf("store: %w", err)
	}
	for i, x := range []struct {
		to  any
		rev *int64
	}{{&r.device, &r.deviceRev}, {&r.seen, &r.seenRev}} {
		for _, kv := range resp.Responses[i].GetResponseRange().Kvs {
			if err := json.Unmarshal(kv.Value, x.to); err != nil {
				return r, fmt.Errorf("store: %s: %w", kv.Key, err)
			}
			*x.rev = kv.ModRevision
		}
	}
	return r, nil
}

// appraise judges encoded evidence and, if it is affirmed, issues a
// certificate.
func (s *Service) appraise(ctx context.Context, data []byte, now time.Time) (*attest.AttestResponse, error) {
	refused := func(id attest.Digest, err error) *attest.AttestResponse {
		return &attest.AttestResponse{Result: verifier.Refused(s.Verifier, id, now, err)}
	}
	if err := s.shared.err(); err != nil {
		return nil, err
	}
	e, err := attest.ParseEvidence(data)
	if err != nil {
		return refused(attest.Digest{}, err), nil
	}
	id := e.DeviceID()
	// The nonce's age is judged by the exact time.
	nonce, err := s.nonces.Check(e.Nonce, id, s.Now())
	if err != nil {
		return refused(id, err), nil
	}
	reportID := report.ID(data) // equal evidence has equal bytes, see ParseEvidence
	for try := range attempts {
		rec, err := s.record(ctx, id, try == 0)
		if err != nil {
			return nil, err
		}
		if err := rec.seen.unused(nonce); err != nil {
			return refused(id, err), nil
		}
		if err := s.suspended(e, rec); err != nil {
			return refused(id, err), nil
		}
		in, out := s.judge(e, rec, now)
		if !out.Bound { // anyone can make such evidence: it leaves no trace
			return &attest.AttestResponse{Result: out.Result}, nil
		}
		ok, err := s.commit(ctx, id, rec, nonce, in, out, reportID)
		var why *attest.Refusal
		switch {
		case errors.As(err, &why):
			return refused(id, why), nil
		case err != nil:
			return nil, err
		case ok:
			return s.conclude(ctx, data, in, out, rec.device, reportID)
		}
	}
	return nil, attest.Refuse(attest.ReasonBusy, "the record of device %s changes all the time; try again", id)
}

// judge appraises evidence by what is in force now.
func (s *Service) judge(e *attest.Evidence, rec record, now time.Time) (in verifier.Input, out verifier.Outcome) {
	id := e.DeviceID()
	in = verifier.Input{Evidence: e, Verifier: s.Verifier, Now: now, Logs: &s.logs, References: s.unsigned()}
	in.Policy, in.Shadow, in.PolicyNeeded = s.Policies.InForce(now)
	if p := in.Policy; p != nil && s.policySuspended(p.Bundle.Version) {
		in.Policy = nil
	}
	if rec.deviceRev != 0 {
		in.Device = &verifier.Device{ID: rec.device.ID, AK: rec.device.AK, Clock: rec.seen.Clock, Retried: rec.seen.Unsafe, Volume: rec.seen.Volume}
	}
	in.Firmware = s.Commons.Count(id, verifier.FirmwareOf(e))
	out = verifier.Appraise(in)
	if out.Result.Status != attest.StatusAffirming && out.Bound && s.Reports != nil {
		// Once more, now with what changed since the last good boot. A report
		// that cannot be read, such as one of a former report key, costs the
		// refusal these words and not itself.
		var err error
		if in.LastGood, err = s.Reports.lastGood(rec.seen); err != nil {
			s.Log.Warn("the report of the last good boot cannot be read", "device", id, "error", err)
		}
		out = verifier.Appraise(in)
	}
	return in, out
}

// commit records an appraisal if the device's record is still what it was
// judged by: this is what makes a nonce good for one use, with any verifier.
func (s *Service) commit(ctx context.Context, id attest.Digest, rec record, nonce verifier.Nonce, in verifier.Input, out verifier.Outcome, reportID string) (bool, error) {
	now, next := in.Now, rec.seen
	if err := next.use(nonce, s.Now()); err != nil {
		return false, err
	}
	r := out.Result
	next.Last, next.Status, next.Reason, next.Unsafe = now.UTC(), r.Status, r.Reason, r.Reason == attest.ReasonClockUnsafe
	if r.Status == attest.StatusAffirming {
		next.Clock, next.Firmware, next.Image, next.Affirmed = &out.Clock, out.Firmware, r.Image, now.UTC()
		if next.Volume == nil { // the first one seen is what others are compared with
			next.Volume = out.Volume
		}
	}
	if s.Reports != nil {
		next.note(ReportInfo{ID: reportID, Time: now.UTC(), Affirming: r.Status == attest.StatusAffirming})
	}
	data, err := json.Marshal(next)
	if err != nil {
		return false, fmt.Errorf("store: %w", err)
	}
	device, seen := s.keys.device(id), s.keys.seen(id)
	c := store.Change{
		Key: seen,
		If: []clientv3.Cmp{
			clientv3.Compare(clientv3.ModRevision(device), "=", rec.deviceRev),
			clientv3.Compare(clientv3.ModRevision(seen), "=", rec.seenRev),
		},
		Then: []clientv3.Op{clientv3.OpPut(seen, string(data))},
	}
	if f := verifier.FirmwareOf(in.Evidence); r.Status == attest.StatusAffirming && !s.Commons.learned(id, f) {
		c.Then = append(c.Then, clientv3.OpPut(s.keys.firmware(id), f.String()))
	}
	return s.Store.Commit(ctx, c)
}

// conclude draws the consequences of an appraisal that was recorded: the
// certificate, the brake, the report.
func (s *Service) conclude(ctx context.Context, evidence []byte, in verifier.Input, out verifier.Outcome, d Device, reportID string) (*attest.AttestResponse, error) {
	r := out.Result
	resp := &attest.AttestResponse{Result: r}
	if r.Status == attest.StatusAffirming {
		cert, err := s.Issuer.Issue(r.Device, out.Key, reportID, in.Now)
		if err != nil {
			return nil, err
		}
		resp.Chain = [][]byte{cert}
		if ca := s.Issuer.CA(); !bytes.Equal(ca.RawSubject, ca.RawIssuer) {
			resp.Chain = append(resp.Chain, ca.Raw)
		}
	}
	if err := s.brake(ctx, r); err != nil {
		return nil, err
	}
	if s.Reports == nil {
		return resp, nil
	}
	rec := report.Record{
		ID: d.ID[:], EK: d.EK, EKCertificate: d.EKCertificate, AK: d.AK, Clock: in.Device.Clock, Retried: in.Device.Retried,
	}
	if v := in.Device.Volume; v != nil {
		rec.Volume = v[:]
	}
	out.Result.Report = reportID
	data, token, err := report.Make(evidence, in, out, rec, s.Organization, s.Lifetime, s.Reports.key)
	if err != nil {
		return nil, err
	}
	resp.Token, resp.Result.Report = token, reportID
	return resp, s.Reports.save(ctx, in, out, reportID, data)
}

// brake tells the brake of a result and holds the roll-out of policies if it
// was one too many.
func (s *Service) brake(ctx context.Context, r attest.Result) error {
	n := 0
	if r.Status != attest.StatusAffirming {
		var err error
		if n, err = s.enrolled(ctx); err != nil {
			return err
		}
	}
	h := s.Brake.Note(r, n, s.Now())
	if h == nil {
		return nil
	}
	s.Log.Error("mass refusal: the roll-out of policies is held; see attestctl policy status", "refused", h.Refused, "enrolled", h.Devices, "reasons", h.Reasons)
	return s.holdPolicies(ctx, *h)
}
