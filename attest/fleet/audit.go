package fleet

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"

	"sekisho/attest/archive"
	"sekisho/attest/auditlog"
)

// Paths of the admin API for the log of reports.
const (
	AdminAuditKey   = "/admin/v1/audit/key"   // GET → AuditKey
	AdminAuditProof = "/admin/v1/audit/proof" // GET /{id} → auditlog.Proof
	AdminAuditLog   = "/admin/v1/audit/log"   // GET /{name...} → AuditFile, a file of C2SP tlog-tiles
)

// maxAuditFile bounds a file of the log in bytes.
const maxAuditFile = 1 << 20

// AuditKey is the key that the log's checkpoints are verified by.
type AuditKey struct {
	Key  string `json:"key"`  // as a note's key
	Size uint64 `json:"size"` // leaves of the log
}

// AuditFile is one file of the log.
type AuditFile struct {
	Data []byte `json:"data"`
}

// errNoAudit says that this verifier keeps no log.
var errNoAudit = errors.New("this verifier keeps no log of its reports")

// openAudit opens the log of the archive's reports, with its key, which is made
// on first use.
func openAudit(ctx context.Context, keyFile, dir string, c *Config) (*auditlog.Log, error) {
	data, err := ownFile(keyFile, func() ([]byte, error) { return auditlog.NewKey(c.Verifier, c.Organization) })
	if err != nil {
		return nil, fmt.Errorf("log_key: %w", err)
	}
	key, err := auditlog.ParseKey(data)
	if err != nil {
		return nil, fmt.Errorf("log_key: %s: %w", keyFile, err)
	}
	return auditlog.Open(ctx, dir, key, c.Reports.Archive, c.Log)
}

func (a *admin) auditRoutes() []route {
	return []route{
		{pattern: "GET " + AdminAuditKey, handler: a.auditKey},
		{pattern: "GET " + AdminAuditProof + "/{id}", handler: a.auditProof},
		{pattern: "GET " + AdminAuditLog + "/{name...}", handler: a.auditFile},
	}
}

func (a *admin) auditKey(w http.ResponseWriter, _ *http.Request) {
	if a.Audit == nil {
		a.fail(w, http.StatusNotFound, errNoAudit)
		return
	}
	reply(w, http.StatusOK, AuditKey{a.Audit.Key(), a.Audit.Size()})
}

func (a *admin) auditProof(w http.ResponseWriter, r *http.Request) {
	if a.Audit == nil {
		a.fail(w, http.StatusNotFound, errNoAudit)
		return
	}
	id, err := archive.ParseID(r.PathValue("id"))
	if err != nil {
		a.fail(w, http.StatusBadRequest, err)
		return
	}
	p, err := a.Audit.Proof(r.Context(), id)
	if errors.Is(err, archive.ErrNotFound) || errors.Is(err, auditlog.ErrNotInLog) {
		a.fail(w, http.StatusNotFound, err)
		return
	}
	answer(a, w, p, err)
}

func (a *admin) auditFile(w http.ResponseWriter, r *http.Request) {
	if a.Audit == nil {
		a.fail(w, http.StatusNotFound, errNoAudit)
		return
	}
	data, err := a.Audit.Read(r.Context(), r.PathValue("name"), maxAuditFile)
	if errors.Is(err, os.ErrNotExist) {
		a.fail(w, http.StatusNotFound, err)
		return
	}
	answer(a, w, AuditFile{data}, err)
}

// AuditKey returns the key of the log of reports.
func (a *Admin) AuditKey(ctx context.Context) (k AuditKey, err error) {
	return k, a.do(ctx, http.MethodGet, AdminAuditKey, nil, &k)
}

// AuditProof returns the proof that a report is in the log.
func (a *Admin) AuditProof(ctx context.Context, id string) (p auditlog.Proof, err error) {
	return p, a.do(ctx, http.MethodGet, AdminAuditProof+"/"+url.PathEscape(id), nil, &p)
}

// AuditLog is the log of reports, for auditlog.Copy.
type AuditLog struct{ *Admin }

// Read implements auditlog.Source.
func (l AuditLog) Read(ctx context.Context, name string, limit int64) ([]byte, error) {
	var f AuditFile
	if err := l.do(ctx, http.MethodGet, AdminAuditLog+"/"+filepath.ToSlash(name), nil, &f); err != nil {
		return nil, err
	}
	if int64(len(f.Data)) > limit {
		return nil, fmt.Errorf("%s: over %d bytes", name, limit)
	}
	return f.Data, nil
}
