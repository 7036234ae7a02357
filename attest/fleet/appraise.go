package fleet

import (
	"bytes"
	"errors"
	"maps"
	"slices"
	"time"

	"sekisho/attest"
	"sekisho/attest/report"
	"sekisho/attest/verifier"
)

// appraise judges encoded evidence and, if it is affirmed, issues a
// certificate.
func (s *Service) appraise(data []byte, now time.Time) (*attest.AttestResponse, error) {
	refused := func(id attest.Digest, err error) *attest.AttestResponse {
		return &attest.AttestResponse{Result: verifier.Refused(s.Verifier, id, now, err)}
	}
	e, err := attest.ParseEvidence(data)
	if err != nil {
		return refused(attest.Digest{}, err), nil
	}
	id := e.DeviceID()
	// The nonce's age is judged by the exact time.
	if err := s.nonces.Use(e.Nonce, id, s.Now()); err != nil {
		return refused(id, err), nil
	}
	in := verifier.Input{Evidence: e, Verifier: s.Verifier, Now: now, Logs: &s.logs}
	in.Policy, in.Shadow, in.PolicyNeeded = s.Policies.InForce(now)
	var device Device
	enrolled := 0
	err = s.Store.View(func(r *Registry) error {
		var known bool
		if device, known = r.Devices[id]; known {
			in.Device = &verifier.Device{ID: device.ID, AK: device.AK, Clock: device.Clock, Retried: s.retried(id)}
		}
		enrolled = len(r.Devices)
		in.References = s.unsigned(r)
		return nil
	})
	if err != nil {
		return nil, err
	}
	in.Firmware = s.Commons.Count(id, verifier.FirmwareDigest(e.PCRs))
	out := verifier.Appraise(in)
	if out.Result.Status != attest.StatusAffirming && authentic(out.Result) && s.Reports != nil {
		// Once more, now with what changed since the last good boot.
		if in.LastGood, err = s.Reports.LastGood(id); err != nil {
			return nil, err
		}
		out = verifier.Appraise(in)
	}
	resp := &attest.AttestResponse{Result: out.Result}
	if out.Result.Status == attest.StatusAffirming {
		if resp.Chain, err = s.admit(id, out, now); err != nil {
			var why *attest.Refusal
			if errors.As(err, &why) {
				return refused(id, why), nil
			}
			return nil, err
		}
	}
	if err := s.conclude(in, out, device, enrolled, resp); err != nil {
		return nil, err
	}
	return resp, nil
}

// unsigned are the reference values of the configuration and, where no policy
// keys are configured, those that attestctl added.
func (s *Service) unsigned(r *Registry) []attest.ReferenceValues {
	list := append([]attest.ReferenceValues(nil), s.References...)
	if s.Policies != nil {
		return list
	}
	for _, id := range sortedKeys(r.References) {
		list = append(list, r.References[id])
	}
	return list
}

// admit issues the certificate of an affirming outcome and records it.
func (s *Service) admit(id attest.Digest, out verifier.Outcome, now time.Time) ([][]byte, error) {
	cert, err := s.Issuer.Issue(id, out.Key, now)
	if err != nil {
		return nil, err
	}
	err = s.Store.Update(func(r *Registry) error {
		d, ok := r.Devices[id]
		if !ok {
			return attest.Refuse(attest.ReasonDeviceUnknown, "device %s was removed", id)
		}
		if c := d.Clock; c != nil && (out.Clock.ResetCount < c.ResetCount || out.Clock.ResetCount == c.ResetCount && out.Clock.Clock <= c.Clock) {
			return attest.Refuse(attest.ReasonClockReversed, "newer evidence of device %s came in between", id)
		}
		d.Clock, d.Firmware, d.Image, d.Affirmed = &out.Clock, out.Firmware, out.Result.Image, now.UTC()
		r.Devices[id] = d
		return nil
	})
	if err != nil {
		return nil, err
	}
	chain := [][]byte{cert.Raw}
	if ca := s.Issuer.CA(); !bytes.Equal(ca.RawSubject, ca.RawIssuer) {
		chain = append(chain, ca.Raw)
	}
	return chain, nil
}

// authentic reports whether a result is of evidence that the device's own TPM
// has signed: all else anyone on the network can make, and it neither fills
// the archive nor pulls the brake.
func authentic(r attest.Result) bool {
	return r.Status == attest.StatusAffirming || r.Reason > attest.ReasonSignatureInvalid
}

// conclude keeps the report of an appraisal and draws its consequences.
func (s *Service) conclude(in verifier.Input, out verifier.Outcome, d Device, enrolled int, resp *attest.AttestResponse) error {
	r := out.Result
	if !authentic(r) {
		return nil
	}
	s.mu.Lock()
	if r.Reason == attest.ReasonClockUnsafe {
		s.unsafe[r.Device] = true
	} else {
		delete(s.unsafe, r.Device)
	}
	s.mu.Unlock()
	if h := s.Brake.Note(r, enrolled, s.Now()); h != nil {
		s.Log.Error("mass refusal: the roll-out of policies is held; see attestctl policy status", "refused", h.Refused, "enrolled", h.Devices, "reasons", h.Reasons)
		if err := s.Policies.Hold(*h); err != nil {
			return err
		}
	}
	if r.Status == attest.StatusAffirming {
		if err := s.Commons.Learn(r.Device, verifier.FirmwareDigest(in.Evidence.PCRs)); err != nil {
			return err
		}
	}
	if s.Reports == nil {
		return nil
	}
	rec := report.Record{
		ID: d.ID[:], EK: d.EK, EKCertificate: d.EKCertificate, AK: d.AK, Clock: in.Device.Clock, Retried: in.Device.Retried,
	}
	data, token, err := report.Make(in, out, rec, s.Organization, s.Lifetime, s.Reports.key)
	if err != nil {
		return err
	}
	evidence, err := in.Evidence.Encode()
	if err != nil {
		return err
	}
	resp.Token, resp.Result.Report = token, report.ID(evidence)
	return s.Reports.Save(r.Device, s.Now(), r.Status == attest.StatusAffirming, resp.Result.Report, data)
}

func (s *Service) retried(id attest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.unsafe[id]
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
