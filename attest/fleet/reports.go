package fleet

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"slices"
	"time"

	"sekisho/attest"
	"sekisho/attest/archive"
	"sekisho/attest/report"
	"sekisho/attest/verifier"
)

// reportsKept is how many reports of one device its record names, beside its
// last affirming one. The archive has them all, as long as it keeps any.
const reportsKept = 8

// Reports makes reports and keeps them in the archive of this verifier. It is
// safe for concurrent use.
type Reports struct {
	*archive.Archive
	key *ecdsa.PrivateKey // signs results and reports
}

// ReportInfo names one report.
type ReportInfo struct {
	ID        string        `json:"id"`
	Device    attest.Digest `json:"device_id,omitzero"`
	Time      time.Time     `json:"time"`
	Affirming bool          `json:"affirming"`
}

// note adds a report to those of the device.
func (s *Seen) note(i ReportInfo) {
	s.Reports = append(s.Reports, i)
	good := s.last(true)
	for len(s.Reports) > reportsKept {
		oldest := slices.IndexFunc(s.Reports, func(x ReportInfo) bool { return x != good })
		if oldest >= len(s.Reports)-reportsKept {
			return
		}
		s.Reports = slices.Delete(s.Reports, oldest, oldest+1)
	}
}

// last is the last report of the device or, if affirming is set, its last
// affirming one; the zero value if there is none.
func (s *Seen) last(affirming bool) ReportInfo {
	for _, i := range slices.Backward(s.Reports) {
		if i.Affirming || !affirming {
			return i
		}
	}
	return ReportInfo{}
}

// ReportsOf lists the last reports of a device, oldest first.
func (s *Service) ReportsOf(ctx context.Context, device attest.Digest) ([]ReportInfo, error) {
	r, err := s.record(ctx, device, false)
	if err != nil {
		return nil, err
	}
	list := []ReportInfo{}
	for _, i := range r.seen.Reports {
		i.Device = device
		list = append(list, i)
	}
	return list, nil
}

// Get returns a report: archive.ErrNotFound if it is too old for the archive,
// or another verifier's.
func (r *Reports) Get(id string) ([]byte, error) {
	x, err := archive.ParseID(id)
	if err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	data, err := r.Archive.Get(x)
	if err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	return data, nil
}

// results are those of the newest reports, oldest first. What cannot be read,
// such as a report of a former report key, is left out.
func (r *Reports) results(n int) ([]attest.Result, error) {
	list, err := r.Last(n)
	if err != nil {
		return nil, err
	}
	var results []attest.Result
	for _, data := range list {
		if res, err := report.Result(data, &r.key.PublicKey); err == nil {
			results = append(results, res)
		}
	}
	return results, nil
}

// lastGood returns the event log of the last affirmed boot, nil if that report
// is not here any more.
func (r *Reports) lastGood(seen Seen) ([]byte, error) {
	i := seen.last(true)
	if i.ID == "" {
		return nil, nil
	}
	data, err := r.Get(i.ID)
	if errors.Is(err, archive.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	p, _, err := report.Parse(data, &r.key.PublicKey)
	if err != nil {
		return nil, err
	}
	e, err := attest.ParseEvidence(p.Evidence.Value)
	if err != nil {
		return nil, err
	}
	return e.EventLog, nil
}

// save keeps the report of an appraisal. It returns when it is on disk.
func (r *Reports) save(ctx context.Context, in verifier.Input, out verifier.Outcome, id string, data []byte) error {
	x, err := archive.ParseID(id)
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	e := archive.Entry{ID: x, Device: in.Evidence.DeviceID(), Time: in.Now, Data: data, Common: []archive.Part{{Digest: out.EventLog, Data: in.Evidence.EventLog}, archive.NewPart(in.LastGood)}}
	if in.Policy != nil {
		e.Common = append(e.Common, archive.NewPart(in.Policy.Data))
	}
	if in.Shadow != nil {
		e.Common = append(e.Common, archive.NewPart(in.Shadow.Data))
	}
	if err := r.Append(ctx, e); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	return nil
}
