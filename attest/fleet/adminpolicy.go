package fleet

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"sekisho/attest"
	"sekisho/attest/archive"
	"sekisho/attest/policy"
)

// Paths of the admin API for policies, reports and firmware counts.
const (
	AdminPolicies  = "/admin/v1/policies"  // GET → PolicyStatus; POST bundle, ?shadow, ?force → PolicyInfo
	AdminShadow    = "/admin/v1/shadow"    // DELETE: evaluate it no longer
	AdminHold      = "/admin/v1/hold"      // DELETE: release
	AdminSimulate  = "/admin/v1/simulate"  // POST bundle or draft → Simulation
	AdminReports   = "/admin/v1/reports"   // GET ?device= → []ReportInfo; /{id} → ReportFile
	AdminReportKey = "/admin/v1/reportkey" // GET → ReportKey
	AdminFirmware  = "/admin/v1/firmware"  // GET → FirmwareSummary; POST FirmwareSummary
)

// maxImport bounds a summary of firmware in bytes.
const maxImport = 8 << 20

// ReportFile is one report.
type ReportFile struct {
	ID   string `json:"id"`
	Data []byte `json:"data"` // the file
}

// ReportKey is the key by which results and reports are verified.
type ReportKey struct {
	ID  attest.Digest `json:"id"`
	PEM string        `json:"pem"`
}

func (a *admin) policyRoutes() []route {
	return []route{
		{pattern: "GET " + AdminPolicies, handler: func(w http.ResponseWriter, _ *http.Request) { reply(w, http.StatusOK, a.Policies.Status(a.Now())) }},
		{pattern: "POST " + AdminPolicies, handler: a.publish},
		{pattern: "DELETE " + AdminShadow, handler: func(w http.ResponseWriter, r *http.Request) {
			a.done(w, "shadow policy ended", a.DropShadow(r.Context()))
		}},
		{pattern: "DELETE " + AdminHold, handler: func(w http.ResponseWriter, r *http.Request) { a.done(w, "hold released", a.Release(r.Context())) }},
		{pattern: "POST " + AdminSimulate, handler: a.simulatePolicy},
		{pattern: "GET " + AdminReports, handler: a.reports},
		{pattern: "GET " + AdminReports + "/{id}", handler: a.report},
		{pattern: "GET " + AdminReportKey, handler: a.reportKey},
		{pattern: "GET " + AdminFirmware, handler: func(w http.ResponseWriter, _ *http.Request) { reply(w, http.StatusOK, a.Commons.Summary()) }},
		{pattern: "POST " + AdminFirmware, handler: a.importFirmware},
	}
}

func (a *admin) done(w http.ResponseWriter, what string, err error) {
	if err != nil {
		a.fail(w, http.StatusInternalServerError, err)
		return
	}
	a.log.Info(what)
	reply(w, http.StatusOK, struct{}{})
}

// body reads a request of at most limit bytes.
func (a *admin) body(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, bool) {
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if err != nil {
		a.fail(w, http.StatusBadRequest, err)
		return nil, false
	}
	return data, true
}

func (a *admin) publish(w http.ResponseWriter, r *http.Request) {
	data, ok := a.body(w, r, policy.MaxBundle)
	if !ok {
		return
	}
	q := r.URL.Query()
	i, err := a.Publish(r.Context(), data, q.Has("shadow"), q.Has("force"))
	switch {
	case errors.Is(err, errLocksOut):
		a.fail(w, http.StatusConflict, err)
	case errors.Is(err, policy.ErrUnsigned):
		a.fail(w, http.StatusForbidden, err)
	case err != nil:
		a.fail(w, http.StatusBadRequest, err)
	default:
		reply(w, http.StatusOK, i)
	}
}

func (a *admin) simulatePolicy(w http.ResponseWriter, r *http.Request) {
	data, ok := a.body(w, r, policy.MaxBundle)
	if !ok {
		return
	}
	s, err := a.Simulate(r.Context(), data)
	if err != nil {
		a.fail(w, http.StatusBadRequest, err)
		return
	}
	reply(w, http.StatusOK, s)
}

var errNoReports = errors.New("this verifier stores no reports")

func (a *admin) reports(w http.ResponseWriter, r *http.Request) {
	var id attest.Digest
	if err := id.UnmarshalText([]byte(r.URL.Query().Get("device"))); err != nil {
		a.fail(w, http.StatusBadRequest, fmt.Errorf("device: %w", err))
		return
	}
	if a.Reports == nil {
		a.fail(w, http.StatusNotFound, errNoReports)
		return
	}
	list, err := a.ReportsOf(r.Context(), id)
	answer(a, w, list, err)
}

func (a *admin) report(w http.ResponseWriter, r *http.Request) {
	if a.Reports == nil {
		a.fail(w, http.StatusNotFound, errNoReports)
		return
	}
	data, err := a.Reports.Get(r.PathValue("id"))
	switch {
	case errors.Is(err, archive.ErrNotFound):
		a.fail(w, http.StatusNotFound, err)
	case err != nil:
		a.fail(w, http.StatusBadRequest, err)
	default:
		reply(w, http.StatusOK, ReportFile{r.PathValue("id"), data})
	}
}

func (a *admin) reportKey(w http.ResponseWriter, _ *http.Request) {
	if a.Reports == nil {
		a.fail(w, http.StatusNotFound, errNoReports)
		return
	}
	der, err := x509.MarshalPKIXPublicKey(&a.Reports.key.PublicKey)
	if err != nil {
		a.fail(w, http.StatusInternalServerError, err)
		return
	}
	id, err := policy.KeyID(&a.Reports.key.PublicKey)
	if err != nil {
		a.fail(w, http.StatusInternalServerError, err)
		return
	}
	reply(w, http.StatusOK, ReportKey{id, string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))})
}

func (a *admin) importFirmware(w http.ResponseWriter, r *http.Request) {
	data, ok := a.body(w, r, maxImport)
	if !ok {
		return
	}
	var s FirmwareSummary
	err := json.Unmarshal(data, &s)
	if err == nil {
		err = a.ImportFirmware(r.Context(), s)
	}
	if err != nil {
		a.fail(w, http.StatusBadRequest, err)
		return
	}
	a.log.Info("firmware summary imported", "organization", s.Organization, "values", len(s.Firmware))
	reply(w, http.StatusOK, struct{}{})
}

// Policies says what is in force, pending, in shadow and held.
func (a *Admin) Policies(ctx context.Context) (s PolicyStatus, err error) {
	return s, a.do(ctx, http.MethodGet, AdminPolicies, nil, &s)
}

// Publish publishes a signed policy, or has it evaluated only. force skips the
// simulation.
func (a *Admin) Publish(ctx context.Context, data []byte, shadow, force bool) (i PolicyInfo, err error) {
	q := url.Values{}
	if shadow {
		q.Set("shadow", "")
	}
	if force {
		q.Set("force", "")
	}
	return i, a.do(ctx, http.MethodPost, AdminPolicies+"?"+q.Encode(), data, &i)
}

// DropShadow ends the evaluation of the shadow.
func (a *Admin) DropShadow(ctx context.Context) error {
	return a.do(ctx, http.MethodDelete, AdminShadow, nil, &struct{}{})
}

// Release ends a hold.
func (a *Admin) Release(ctx context.Context) error {
	return a.do(ctx, http.MethodDelete, AdminHold, nil, &struct{}{})
}

// Simulate says what a policy would do to the enrolled devices.
func (a *Admin) Simulate(ctx context.Context, data []byte) (s Simulation, err error) {
	return s, a.do(ctx, http.MethodPost, AdminSimulate, data, &s)
}

// Reports lists the stored reports of a device, oldest first.
func (a *Admin) Reports(ctx context.Context, device string) (list []ReportInfo, err error) {
	return list, a.do(ctx, http.MethodGet, AdminReports+"?device="+url.QueryEscape(device), nil, &list)
}

// Report fetches one report.
func (a *Admin) Report(ctx context.Context, id string) (f ReportFile, err error) {
	return f, a.do(ctx, http.MethodGet, AdminReports+"/"+url.PathEscape(id), nil, &f)
}

// ReportKey fetches the key by which reports are verified.
func (a *Admin) ReportKey(ctx context.Context) (k ReportKey, err error) {
	return k, a.do(ctx, http.MethodGet, AdminReportKey, nil, &k)
}

// Firmware is what this organisation can tell others about firmware.
func (a *Admin) Firmware(ctx context.Context) (s FirmwareSummary, err error) {
	return s, a.do(ctx, http.MethodGet, AdminFirmware, nil, &s)
}

// ImportFirmware takes in another organisation's summary, in JSON.
func (a *Admin) ImportFirmware(ctx context.Context, summary []byte) error {
	return a.do(ctx, http.MethodPost, AdminFirmware, summary, &struct{}{})
}
